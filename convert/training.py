"""A whole training run from one framework to the other: weights, moments, step count, routing bias, data position.

The PyTorch side is a run of `python -m torch_ref.train`, the JAX side one of `train.py`; either goes on where the other
stopped. Only dropout's random numbers do not cross: the frameworks draw different ones. Reading and writing PyTorch's
files needs PyTorch, which is imported when it is needed.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from convert.mapping import PARAMS, entries, leaf
from convert.pickled import check_pickled
from convert.to_flax import TOKENIZER_FILES, read_weights
from convert.to_torch import check_new, write_model
from jaxllm.checkpoint import Training, newest_checkpoint, read_model_config, write_run
from jaxllm.config import TrainConfig, read_json, write_json
from jaxllm.data.position import POSITION_FILE, load_position, save_position
from jaxllm.data.stream import Position
from jaxllm.errors import UserError
from jaxllm.journal import Journal
from jaxllm.metrics import read_metrics, write_metrics
from jaxllm.optim import AdamMoments, adam_moments, optimizer, with_moments
from jaxllm.run import checkpoint_owner
from jaxllm.step import abstract_model, dropout_key


def export_training(run: Path, out: Path) -> None:
    """Make a PyTorch run that goes on where a JAX run's newest checkpoint stands.

    Raises:
        UserError: `run` has no training to go on with, or `out` holds something already.
    """
    hand_over = _pytorch()
    check_new(out)
    saved = newest_checkpoint(run)
    _check_tokenizer(run)
    model = read_model_config(run)
    config = read_config(run)
    if config.data_streams not in (None, 1):
        raise UserError(
            f"{str(run)!r} reads {config.data_streams} data streams and PyTorch's Trainer reads one: "
            "leave out --training"
        )
    if not saved.has_training:
        raise UserError(f"{str(run)!r} holds weights without a training history: leave out --training")
    weights = saved.weights(model)
    checkpoint = out / f"checkpoint-{saved.step}"
    write_model(model, weights, checkpoint, "float32")
    del weights  # a model of this size and its moments need not be in memory together
    training = saved.training(config)
    moments = adam_moments(training.opt_state)
    table = {entry.torch_name: entry for entry in entries(model) if entry.tree == PARAMS}

    def of_parameter(name: str):
        entry = table[name]
        return hand_over.Moments(*(entry.to_torch(np.asarray(leaf(tree, entry.path))) for tree in moments[1:]))

    save_position(checkpoint / POSITION_FILE, training.positions[0])
    hand_over.write_training(checkpoint, config, int(training.step), of_parameter)
    write_json(out / "config.json", model.to_dict())
    write_json(out / "train_config.json", dataclasses.replace(config, run_dir=out).to_dict())
    write_metrics(out, training.journal.records)
    shutil.copytree(run / "tokenizer", out / "tokenizer")


def import_training(source: Path, run: Path) -> None:
    """Make a JAX run that goes on where a PyTorch run's newest checkpoint stands.

    Raises:
        UserError: `source` has no complete checkpoint, or `run` holds something already.
    """
    hand_over = _pytorch()
    from torch_ref.checkpoint import OPTIMIZER_FILE, last_checkpoint, reading

    check_new(run)
    checkpoint = last_checkpoint(source)
    if checkpoint is None:
        raise UserError(f"{str(source)!r} holds no complete checkpoint of a PyTorch run")
    _check_tokenizer(source)
    config = dataclasses.replace(read_config(source), run_dir=run)
    model = config.model
    weights = read_weights(checkpoint.folder, model)
    check_pickled(checkpoint.folder / OPTIMIZER_FILE)
    with reading(checkpoint.folder):
        step, moments = hand_over.read_training(checkpoint.folder, config)
    shapes = abstract_model(model)[1]
    mu, nu = (jax.tree.map(lambda shape: np.zeros(shape.shape, np.float32), shapes) for _ in range(2))
    for entry in entries(model):
        if entry.tree == PARAMS:
            entry.write(leaf(mu, entry.path), moments[entry.torch_name].mu)
            entry.write(leaf(nu, entry.path), moments[entry.torch_name].nu)
    reached = AdamMoments(jnp.asarray(step, jnp.int32), mu, nu)
    journal = Journal([record for record in read_metrics(source) if record["step"] <= step])
    position = load_position(checkpoint.folder / POSITION_FILE, config.seq_len, model.vocab_size)
    training = _training(config, reached, position, journal)
    files = [source / "tokenizer" / name for name in TOKENIZER_FILES]
    write_run(run, model, weights, [file for file in files if file.is_file()], (config, training))
    write_metrics(run, journal.records)


def _training(config: TrainConfig, moments: AdamMoments, position: Position, journal: Journal) -> Training:
    """What `train.py` would have at this point; the key of its dropout follows from the seed."""
    empty = jax.eval_shape(optimizer(config).init, moments.mu)  # beside moments and counts it holds no arrays
    return Training(with_moments(empty, moments), moments.count, dropout_key(config), [position], journal)


def is_pytorch_run(folder: Path) -> bool:
    """Whether it is a run of `python -m torch_ref.train`, not just any folder with a Trainer's checkpoints."""
    return checkpoint_owner(folder) == "PyTorch" and (folder / "train_config.json").is_file()


def _check_tokenizer(run: Path) -> None:
    """Without its own tokenizer a run would go on with another one, under the old weights."""
    if not (run / "tokenizer" / "tokenizer.json").is_file():
        raise UserError(f"{str(run)!r} lacks its tokenizer: put the run's tokenizer.json into {run / 'tokenizer'}")


def read_config(run: Path) -> TrainConfig:
    """The training config of a run of either framework.

    Raises:
        UserError: there is none, or it is not valid.
    """
    file = run / "train_config.json"
    try:
        return TrainConfig.from_dict(read_json(file))
    except UserError as error:
        raise UserError(f"{str(run)!r} is no training run: {error}") from None


def _pytorch() -> ModuleType:
    try:
        from torch_ref import hand_over
    except ImportError:
        raise UserError("a training run of PyTorch needs PyTorch: pip install 'jaxllm[torch]'") from None
    return hand_over
