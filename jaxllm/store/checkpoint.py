"""Reading the checkpoints of a run: nothing is read before all checksums of a checkpoint agree.

Checkpoints are orbax's: weights, optimizer, data position and history in one atomic save. One with `weights` alone (the
converter writes such) is a starting point.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxllm.config import LoraConfig, ModelConfig
from jaxllm.data.stream import MAX_POSITION_BYTES, Position
from jaxllm.errors import UserError, as_user_error, one_line
from jaxllm.files import StrPath, plain_path
from jaxllm.model.decoder import abstract_adapted, abstract_model, model_facts
from jaxllm.model.inference import Hold, masters
from jaxllm.model.layers import ParameterFacts
from jaxllm.store.folder import CHECKPOINTS, checkpoint_steps, is_run, read_model_config
from jaxllm.store.history import History
from jaxllm.store.resume import check_format, choose_checkpoint
from jaxllm.train.computation import Computation
from jaxllm.train.optim import OptimizerState
from jaxllm.train.state import TrainState

Pytree = Any

T = TypeVar("T")

MAX_RETRIES = 10
"""Retries when the training run deletes the checkpoint that is being read."""


class Weights(NamedTuple):
    """A trained model: plain nested dicts, stacked over layers and experts."""

    params: Pytree
    routing_bias: Pytree


class ResumeState(NamedTuple):
    """What a run needs besides the weights to resume."""

    opt_state: OptimizerState
    step: Any  # () int32, updates done
    dropout_key: Any  # raw key data
    positions: Sequence[Position]  # of each data stream
    history: History


def quarantine(run: StrPath, damaged: Sequence[int]) -> None:
    """Move damaged checkpoints to RUN/damaged."""
    run = Path(run)
    for step in damaged:
        target = (run / CHECKPOINTS).resolve().parent / "damaged" / str(step)  # on the same disk
        target.parent.mkdir(exist_ok=True)
        if target.exists():  # the same step, damaged again
            shutil.rmtree(target)
        os.replace(run / CHECKPOINTS / str(step), target)
        print(f"Moved the damaged checkpoint of step {step} to {target}")


def delete_unfinished(run: StrPath) -> None:
    """Delete checkpoints that killed processes left unfinished. The caller holds the run's lock."""
    for folder in Path(run, CHECKPOINTS).glob("*.orbax-checkpoint-tmp*/"):
        shutil.rmtree(folder, ignore_errors=True)


class CheckpointReader:
    """One checkpoint of a run: `choose_checkpoint` says which one is not damaged.

    What cannot be read raises a UserError.
    """

    def __init__(self, run: StrPath, step: int):
        self._folder = Path(run, CHECKPOINTS, str(step))
        self.step = step

    @property
    def has_training(self) -> bool:
        """Whether it holds more than weights."""
        return (self._folder / "training").is_dir()

    def adapters(self, config: ModelConfig, lora: LoraConfig, shardings: Weights | None = None) -> Weights:
        """Its adapters, in the place of parameters, and the routing bias; placed as `weights`."""
        shapes = abstract_adapted(config, lora)
        targets = _targets(Weights(shapes.params, shapes.routing_bias), shardings)
        return Weights(**self._restore(weights=targets._asdict())["weights"])

    def weights(self, config: ModelConfig, shardings: Weights | None = None, hold: Hold = masters) -> Weights:
        """Its weights, placed by `shardings` (None: on the first device), in the dtypes that `hold` chooses."""
        shapes = Weights(*abstract_model(config)[1:])
        if hold is not masters:
            stored = self._stored("weights")

            def held(path: Any, leaf: Any, facts: ParameterFacts) -> jax.ShapeDtypeStruct:
                known = stored.get(tuple(str(getattr(key, "key", None) or key.name) for key in path), leaf)
                narrow = known.dtype in (jnp.bfloat16, jnp.float16)
                return jax.ShapeDtypeStruct(leaf.shape, hold(facts, known.dtype if narrow else jnp.float32))

            shapes = jax.tree_util.tree_map_with_path(held, shapes, Weights(*model_facts(config)))
        restored = self._restore(weights=_targets(shapes, shardings)._asdict())
        return Weights(**restored["weights"])

    def state(
        self, computation: Computation, shardings: TrainState | None = None
    ) -> tuple[TrainState, ResumeState | None]:
        """Its state, and the rest of what a run needs to resume; None for a checkpoint of weights alone.

        The state has the form of one device, and is placed according to `shardings` (None: on the first device).
        """
        wanted = None if shardings is None else Weights(shardings.params, shardings.routing_bias)
        resumed = self.resume_state(computation, shardings)
        model, lora = computation.model, computation.lora
        weights = self.weights(model, wanted) if lora is None else self.adapters(model, lora, wanted)
        if resumed is None:
            start = computation.start_state
            return (start if shardings is None else jax.jit(start, out_shardings=shardings))(*weights), None
        return TrainState(*weights, resumed.opt_state, resumed.step, resumed.dropout_key), resumed

    def resume_state(self, computation: Computation, shardings: TrainState | None = None) -> ResumeState | None:
        """What it holds besides the weights, placed according to `shardings`; None if that is nothing.

        Another format raises a UserError, too.
        """
        if not self.has_training:
            return None
        check_format(self._folder)
        targets = _targets(computation.state, shardings)
        training = {"opt_state": targets.opt_state, "step": targets.step, "dropout_key": targets.dropout_key}
        restored = self._restore(training=training, positions=self._shapes_of_positions(), history=None)
        with self._readable():
            history = History.from_json(restored["history"])
            encoded = [np.asarray(restored["positions"][str(s)]) for s in range(len(restored["positions"]))]
        where, seq_len, vocab_size = str(self._folder), computation.shape[-1], computation.model.vocab_size
        positions = [Position.from_bytes(array.tobytes(), where, seq_len, vocab_size) for array in encoded]
        return ResumeState(**restored["training"], positions=positions, history=history)

    def _shapes_of_positions(self) -> dict[str, np.ndarray]:
        """Arrays to restore the encoded positions into.

        A few bytes can claim any shape: it is checked before memory is allocated for it.
        """
        shapes = {path[-1]: tuple(leaf.shape) for path, leaf in self._stored("positions").items()}
        for shape in shapes.values():
            if len(shape) != 1 or not 0 < shape[0] <= MAX_POSITION_BYTES:
                raise UserError(
                    f"the checkpoint {self._folder} has a data position of shape {shape}, which is not valid: move the "
                    "folder elsewhere to use the one before it"
                )
        return {name: np.empty(shape, np.uint8) for name, shape in shapes.items()}

    def _stored(self, item: str) -> dict[tuple[str, ...], Any]:
        """The shape and dtype of each array of a part of the checkpoint, by its path."""
        with self._readable() as folder:
            found: Any = ocp.StandardCheckpointHandler().metadata(epath.Path(folder / item))
            leaves = jax.tree_util.tree_leaves_with_path(dict(found), is_leaf=lambda leaf: hasattr(leaf, "dtype"))
            return {tuple(str(key.key) for key in path): leaf for path, leaf in leaves}

    def _restore(self, **targets: Pytree) -> dict[str, Any]:
        args = {
            name: ocp.args.JsonRestore() if name == "history" else ocp.args.StandardRestore(target)
            for name, target in targets.items()
        }
        with self._readable() as folder, ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            return dict(checkpointer.restore(folder, args=ocp.args.Composite(**args)))

    @contextlib.contextmanager
    def _readable(self) -> Iterator[Path]:
        """The folder by a plain path. What goes wrong while it is read becomes one line."""

        def message(error: Exception) -> str:
            return (
                f"the checkpoint {self._folder} cannot be read ({one_line(error)}): its checksums are correct, so the "
                "library versions may differ: use those that wrote it; move the folder elsewhere to use the one before "
                "it"
            )

        with as_user_error(message), plain_path(self._folder) as folder:
            yield folder


def _targets(shapes: Pytree, shardings: Pytree | None) -> Pytree:
    """What orbax restores and where to, whatever layout was saved."""
    if shardings is None:
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: first, shapes)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def newest_checkpoint(run: StrPath) -> CheckpointReader:
    """The newest undamaged checkpoint of a run's folder. Raises a UserError if it is not one, or has none."""
    run = Path(run)
    if not is_run(run):
        raise UserError(
            f"{str(run)!r} is not a run folder: it has no folder checkpoints; pass the folder of a run, as runs/tiny"
        )
    step = choose_checkpoint(run).step
    if step is None:
        raise UserError(f"{run / 'checkpoints'} holds no complete checkpoint: train the run, or pass another")
    return CheckpointReader(run, step)


def read_newest(run: StrPath, read: Callable[[CheckpointReader], T]) -> T:
    """What `read` makes of the newest undamaged checkpoint. It is called again if a training run removes that one.

    Raises:
        UserError: as `newest_checkpoint` and `read`; or new checkpoints come faster than one is read.
    """
    run = Path(run)
    for _ in range(MAX_RETRIES):
        newest = checkpoint_steps(run)[-1:]
        try:
            return read(newest_checkpoint(run))
        except UserError:
            if checkpoint_steps(run)[-1:] <= newest:
                raise
    raise UserError(
        f"{run / 'checkpoints'}: the run that trains there removes each checkpoint before it is read: resume it with "
        "a larger --keep-checkpoints or --save-every"
    )


def load_weights(run: StrPath, hold: Hold = masters) -> tuple[ModelConfig, Weights]:
    """Model config and newest weights of a run, in the dtypes that `hold` chooses. Raises as `newest_checkpoint`."""
    config = read_model_config(run)
    return config, read_newest(run, lambda saved: saved.weights(config, hold=hold))
