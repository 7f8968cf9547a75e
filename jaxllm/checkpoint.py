"""Checkpoints of a run, by orbax: weights, optimizer and data position in one atomic save.

    RUN/config.json            the model's shape             RUN/tokenizer/             the tokenizer
    RUN/train_config.json      how it was trained            RUN/checkpoints/STEP/      weights | training | position
                                                                                        and rows, of each data stream

A checkpoint whose `training` and `position` are absent (the converter writes such) is a starting point: weights only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxllm.config import ModelConfig, TrainConfig, read_json, write_json
from jaxllm.data.corpus import one_line
from jaxllm.data.stream import Position
from jaxllm.errors import UserError
from jaxllm.step import TrainState, abstract_model, init_state, start_state

Pytree = Any


class Weights(NamedTuple):
    """What a trained model is; plain nested dicts, stacked over layers and experts."""

    params: Pytree
    routing_bias: Pytree


class Training(NamedTuple):
    """What a run needs beside the weights to go on."""

    opt_state: Pytree
    step: Any  # () int32, updates done
    dropout_key: Any  # raw key data
    positions: Sequence[Position]  # of each data stream


def is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()


def read_model_config(folder: Path) -> ModelConfig:
    """The model's shape from a run or an exported folder.

    Raises:
        UserError: there is none, or it is not valid.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{str(folder)!r} is no run and no exported model: it holds no config.json")
    try:
        return ModelConfig.from_dict(read_json(folder / "config.json"))
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None


class Checkpoints:
    """The checkpoints of one run folder. Saving is asynchronous; `close` waits for it."""

    def __init__(self, folder: Path, keep: int | None = None):
        self._folder = folder / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(epath.Path(self._folder.resolve()), options=options)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, positions: Sequence[Position]) -> None:
        """Save a state in the form of one device (`parallel.unplaced`), over however many it is spread.

        Of a run of several processes all save, each with the positions of all data streams.
        """
        items: dict[str, Any] = {}
        for name, rows, position in zip(*_stream_items(len(positions)), positions, strict=True):
            items[name] = ocp.args.JsonSave({"source": position.source, "drawn": position.drawn})
            items[rows] = ocp.args.StandardSave({"pool": position.pool, "tokens": _with_length(position.tokens)})
        training = {"opt_state": state.opt_state, "step": state.step, "dropout_key": state.dropout_key}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                weights=ocp.args.StandardSave(Weights(state.params, state.routing_bias)._asdict()),
                training=ocp.args.StandardSave(training),
                **items,
            ),
        )

    def save_weights(self, weights: Weights) -> None:
        """Save weights alone, as step 0."""
        self._manager.save(0, args=ocp.args.Composite(weights=ocp.args.StandardSave(weights._asdict())))

    def restore_weights(self, config: ModelConfig, shardings: Weights | None = None) -> Weights:
        """The newest weights, where `shardings` says; None: on the first device.

        Raises:
            UserError: there is no checkpoint, or it cannot be read.
        """
        _, params, routing_bias = abstract_model(config)
        restored = self._restore(weights=_targets(Weights(params, routing_bias), shardings)._asdict())
        return Weights(**restored["weights"])

    def restore(
        self, config: TrainConfig, shardings: TrainState | None = None
    ) -> tuple[TrainState, Sequence[Position] | None]:
        """The newest state and the data positions behind it; None for a checkpoint that holds weights alone.

        The state has the form of one device, and lies where `shardings` says (None: on the first device).

        Raises:
            UserError: there is no checkpoint, or it cannot be read.
        """
        wanted = None if shardings is None else Weights(shardings.params, shardings.routing_bias)
        weights = self.restore_weights(config.model, wanted)
        training = self.restore_training(config, shardings)
        if training is None:
            start = functools.partial(start_state, config)
            return (start if shardings is None else jax.jit(start, out_shardings=shardings))(*weights), None
        return TrainState(*weights, training.opt_state, training.step, training.dropout_key), training.positions

    def has_training(self) -> bool:
        """Whether the newest checkpoint holds more than weights."""
        return (self._folder / str(self.latest()) / "training").is_dir()

    def restore_training(self, config: TrainConfig, shardings: TrainState | None = None) -> Training | None:
        """What the newest checkpoint holds beside the weights; None for one that holds weights alone.

        It lies where `shardings` says (None: on the first device).

        Raises:
            UserError: there is no checkpoint, or it cannot be read.
        """
        if not self.has_training():
            return None
        targets = _targets(jax.eval_shape(lambda: init_state(config)), shardings)
        training = {"opt_state": targets.opt_state, "step": targets.step, "dropout_key": targets.dropout_key}
        names, rows = _stream_items(config.data_streams or 1)
        restored = self._restore(training=training, **dict.fromkeys((*names, *rows)))
        positions = []
        for name, row in zip(names, rows, strict=True):
            arrays = jax.tree.map(np.asarray, restored[row])
            source, drawn = restored[name]["source"], restored[name]["drawn"]
            positions.append(Position(source, drawn, tokens=arrays["tokens"][1:], pool=arrays["pool"]))
        return Training(**restored["training"], positions=positions)

    def wait(self) -> None:
        """Wait until what was saved is on the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def _restore(self, **targets: Pytree) -> dict[str, Any]:
        step = self.latest()
        if step is None:
            raise UserError(f"{self._folder} holds no complete checkpoint")
        args = {
            name: ocp.args.JsonRestore() if name.startswith("position") else ocp.args.StandardRestore(target)
            for name, target in targets.items()
        }
        try:
            return dict(self._manager.restore(step, args=ocp.args.Composite(**args)))
        except Exception as error:  # orbax, tensorstore and the file system raise kinds of their own
            raise UserError(
                f"the checkpoint {self._folder / str(step)} cannot be read ({one_line(error)}): "
                "delete that folder to use the one before it"
            ) from None


def _stream_items(streams: int) -> tuple[list[str], list[str]]:
    """Names of the items that keep the position and the rows of each data stream."""
    ends = ["", *(f"_{s}" for s in range(1, streams))]
    return [f"position{end}" for end in ends], [f"rows{end}" for end in ends]


def _with_length(tokens: np.ndarray) -> np.ndarray:
    """Orbax cannot save an array without elements: put the length in front."""
    return np.concatenate([np.asarray([len(tokens)], np.int32), tokens])


def _targets(shapes: Pytree, shardings: Pytree | None) -> Pytree:
    """What orbax shall restore and where to, whatever layout was saved."""
    if shardings is None:
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: first, shapes)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def write_run(
    folder: Path,
    model: ModelConfig,
    weights: Weights,
    tokenizer_files: list[Path],
    training: tuple[TrainConfig, Training] | None = None,
) -> None:
    """Make a run folder that starts from given weights or, with `training`, goes on where they were reached."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", model.to_dict())
    if tokenizer_files:
        (folder / "tokenizer").mkdir(exist_ok=True)
    for file in tokenizer_files:
        (folder / "tokenizer" / file.name).write_bytes(file.read_bytes())
    checkpoints = Checkpoints(folder)
    if training is None:
        checkpoints.save_weights(weights)
    else:
        config, reached = training
        write_json(folder / "train_config.json", config.to_dict())
        state = TrainState(*weights, reached.opt_state, reached.step, reached.dropout_key)
        checkpoints.save(int(reached.step), state, reached.positions)
    checkpoints.close()


def load_weights(run: Path) -> tuple[ModelConfig, Weights]:
    """Model config and newest weights of a run folder.

    Raises:
        UserError: it is no run, or the checkpoint cannot be read.
    """
    config = read_model_config(run)
    if not is_run(run):
        raise UserError(f"{str(run)!r} is no run: it holds no folder checkpoints")
    checkpoints = Checkpoints(run)
    try:
        return config, checkpoints.restore_weights(config)
    finally:
        checkpoints.close()
