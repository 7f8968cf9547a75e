"""A whole training run from one framework to the other: weights, moments, step count, routing bias, data position.

The PyTorch side is a run of `python -m torch_ref.train`, the JAX side one of `train.py`; either resumes where the other
stopped. Only dropout's random numbers do not cross: the frameworks draw different ones. Reading and writing PyTorch's
files needs PyTorch, which is imported when it is needed.
"""

import importlib
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convert.mapping import PARAMS, entries
from convert.new_folder import check_new, new_folder
from convert.pickled import check_pickled
from convert.to_flax import read_weights
from convert.to_torch import write_model
from jaxllm.config import RunConfig, TrainConfig
from jaxllm.config.families import names_of
from jaxllm.data.stream import POSITION_FILE, read_position
from jaxllm.errors import UserError, as_user_error, one_line
from jaxllm.files import StrPath, write_json
from jaxllm.model.decoder import abstract_model
from jaxllm.packages import check_own
from jaxllm.store.checkpoint import CheckpointReader, ResumeState, Weights, read_newest
from jaxllm.store.checkpoint_writer import write_run
from jaxllm.store.folder import CONFIG_FILE, MODEL_FILE, TOKENIZER, checkpoint_owner, read_config, read_model_config
from jaxllm.store.history import History
from jaxllm.store.metrics_file import read_metrics, write_metrics
from jaxllm.store.source import tokenizer_files
from jaxllm.train.computation import Computation
from jaxllm.train.optim import OptimizerState, of_adamw
from jaxllm.train.state import dropout_key


def export_training(run: StrPath, out: StrPath) -> None:
    """Make a PyTorch run that resumes from a JAX run's newest checkpoint.

    Raises:
        UserError: `run` has no training to resume, or `out` holds something already.
    """
    run, out = Path(run), Path(out)
    _check_pytorch()
    from torch_ref import hand_over

    check_new(out)
    model = read_model_config(run)
    if names_of(model) != "customllm":
        raise UserError(f"{str(run)!r} is not a CustomLLM, the only model that torch_ref trains: leave out --training")
    _check_tokenizer(run)
    config = read_config(run, TrainConfig)
    if config.data_streams != 1:
        raise UserError(
            f"{str(run)!r} reads {config.data_streams} data streams and PyTorch's Trainer reads one: "
            "leave out --training"
        )

    def read(saved: CheckpointReader) -> tuple[Weights, ResumeState]:
        if (resumed := saved.resume_state(Computation.of(config))) is None:
            raise UserError(f"{str(run)!r} holds weights without a training history: leave out --training")
        return saved.weights(model), resumed

    weights, resumed = read_newest(run, read)
    table = {entry.torch_name: entry for entry in entries(model)}

    def of_parameter(name: str):
        mu, nu = ({PARAMS: tree} for tree in resumed.opt_state[1:])
        entry = table[name]
        return hand_over.Moments(entry.to_torch(mu), entry.to_torch(nu) if entry.lies_in(nu) else None)

    torch_config = config.as_type(RunConfig).with_options(run_dir=out)
    with new_folder(out) as made:
        checkpoint = made / f"checkpoint-{int(resumed.step)}"
        write_model(model, weights, checkpoint, "float32")
        (checkpoint / POSITION_FILE).write_bytes(resumed.positions[0].to_bytes())
        hand_over.write_training(checkpoint, torch_config, int(resumed.step), of_parameter)
        write_json(made / MODEL_FILE, model.to_dict())
        write_json(made / CONFIG_FILE, torch_config.to_dict())
        write_metrics(made, resumed.history.records)
        shutil.copytree(run / TOKENIZER, made / TOKENIZER)


def import_training(source: StrPath, run: StrPath) -> None:
    """Make a JAX run that resumes from a PyTorch run's newest checkpoint.

    Raises:
        UserError: `source` has no complete checkpoint, or `run` holds something already.
    """
    source = Path(source)
    _check_pytorch()
    from torch_ref import hand_over
    from torch_ref.checkpoint import OPTIMIZER_FILE, last_checkpoint, reading

    check_new(run)
    checkpoint = last_checkpoint(source)
    if checkpoint is None:
        raise UserError(f"{str(source)!r} holds no complete checkpoint of a PyTorch run")
    _check_tokenizer(source)
    config = read_config(source, RunConfig).as_type(TrainConfig).with_options(run_dir=run)
    model = config.model
    weights = read_weights(checkpoint.folder, model)
    check_pickled(checkpoint.folder / OPTIMIZER_FILE)
    with reading(checkpoint.folder):
        step, moments = hand_over.read_training(checkpoint.folder, model, config.optim)
    shapes = abstract_model(model)[1]
    shapes = (shapes, of_adamw(model, config.optim, shapes))
    mu, nu = jax.tree.map(lambda shape: np.zeros(shape.shape, np.float32), shapes)
    for entry in entries(model):
        if entry.is_parameter:
            found = moments[entry.torch_name]
            entry.write({PARAMS: mu}, found.mu)
            if found.nu is not None:
                entry.write({PARAMS: nu}, found.nu)
    count = jnp.asarray(step, jnp.int32)
    history = History.from_records([record for record in read_metrics(source) if record["step"] <= step])
    position = read_position(checkpoint.folder / POSITION_FILE, config.data.seq_len, model.vocab_size)
    # the key of dropout follows from the seed
    resumed = ResumeState(OptimizerState(count, mu, nu), count, dropout_key(config.seed), [position], history)
    with new_folder(run) as made:
        write_run(made, model, weights, (config, resumed), tokenizer_files(source / TOKENIZER))
        write_metrics(made, history.records)


def is_pytorch_run(folder: StrPath) -> bool:
    """Whether it is a run of `python -m torch_ref.train`, not just any folder with a Trainer's checkpoints."""
    return checkpoint_owner(folder) == "PyTorch" and Path(folder, CONFIG_FILE).is_file()


def _check_tokenizer(run: Path) -> None:
    """Without its tokenizer, a run would resume the old weights with another one."""
    if not (run / TOKENIZER / "tokenizer.json").is_file():
        raise UserError(f"{str(run)!r} lacks its tokenizer: put the run's tokenizer.json into {run / TOKENIZER}")


def _check_pytorch() -> None:
    """Raise a UserError if what is needed of it cannot be imported."""
    check_own("torch_ref")
    needs = "a training run of PyTorch needs PyTorch: pip install 'jaxllm[torch]'"
    with as_user_error(lambda error: f"{needs} ({one_line(error)})"):
        importlib.import_module("torch_ref.hand_over")
