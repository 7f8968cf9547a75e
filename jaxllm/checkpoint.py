"""Checkpoints of a run, by orbax: weights, optimizer, data position and log in one atomic save.

    RUN/config.json            the model's shape             RUN/tokenizer/             the tokenizer
    RUN/train_config.json      how it was trained            RUN/checkpoints/STEP/      weights | training | journal |
                                                                  position and rows, of each data stream; checksums.json

A checkpoint with `weights` alone (the converter writes such) is a starting point. Nothing is read from a checkpoint
before all its checksums agree.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.path import atomicity

from jaxllm.atomic import move_to_the_disk
from jaxllm.checksums import find_damage, read_list, write_checksums
from jaxllm.config import SPECIAL_TOKENS, ModelConfig, TrainConfig, read_json, write_json
from jaxllm.data.corpus import one_line
from jaxllm.data.position import check_fits
from jaxllm.data.stream import Position
from jaxllm.errors import UserError
from jaxllm.journal import Journal
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
    journal: Journal


class Choice(NamedTuple):
    """Which checkpoint of a run is read."""

    step: int | None  # the newest one that is sound; None: there is none
    damaged: list[int]  # newer ones


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


def choose_checkpoint(run: Path, *, strict: bool = False, before: int | None = None) -> Choice:
    """The newest checkpoint whose checksums agree; each damaged one on the way is named in a line on stderr.

    Args:
        run: the run's folder.
        strict: refuse instead of passing over a damaged one.
        before: consider only checkpoints of earlier steps than this.

    Raises:
        UserError: all are damaged, or one is and that is not to be passed over; or the model's config or the tokenizer
            is not the one that the checkpoint was written with.
    """
    folder = run / "checkpoints"
    damaged: list[int] = []
    for step in sorted(_steps(run), reverse=True):
        if before is not None and step >= before:
            continue
        damage = find_damage(folder / str(step))
        if damage is None:
            _check_beside(run, folder / str(step))
            return Choice(step, damaged)
        if strict:
            raise UserError(
                f"the checkpoint {folder / str(step)} is damaged ({damage}): "
                "leave out --strict to use the one before it, or put the file back"
            )
        print(f"warning: the checkpoint {folder / str(step)} is damaged ({damage})", file=sys.stderr)
        damaged.append(step)
    if damaged:
        earlier = "" if before is None else f" before step {before}"
        raise UserError(
            f"{folder} holds no checkpoint{earlier} that is not damaged: put the files back, or pass --overwrite to "
            "start anew"
        )
    return Choice(None, damaged)


def _steps(run: Path) -> list[int]:
    """Of the checkpoints in a run's folder, in no order."""
    names = [path.name for path in (run / "checkpoints").glob("*/")]
    return [int(name) for name in names if name.isdecimal() and name == str(int(name))]


def oldest_step(run: Path) -> int | None:
    return min(_steps(run), default=None)


def _beside(run: Path) -> dict[str, Any]:
    """What a checkpoint needs of its run's folder: the model's config, and the checksum of the tokenizer."""
    config, tokenizer = run / "config.json", run / "tokenizer" / "tokenizer.json"
    return {
        "model": read_json(config) if config.is_file() else None,
        "tokenizer": hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else None,
    }


def _check_beside(run: Path, checkpoint: Path) -> None:
    written, now = read_list(checkpoint), _beside(run)
    if now["tokenizer"] is not None and written.get("tokenizer") not in (None, now["tokenizer"]):
        raise UserError(
            f"{run / 'tokenizer' / 'tokenizer.json'} is not the file that {checkpoint} was written with: put it back"
        )
    if written.get("model") is None:
        return
    model = read_model_config(run)
    # weights that came without a tokenizer name no special tokens, until they are trained with one
    unset = {name: getattr(model, name) for name in SPECIAL_TOKENS if written["model"].get(name) is None}
    if ModelConfig.from_dict(written["model"] | unset) != model:
        raise UserError(f"{run / 'config.json'} is not the config that {checkpoint} was written with: put it back")


def set_aside(run: Path, damaged: Sequence[int]) -> None:
    """Move damaged checkpoints to RUN/damaged, out of the way of those to come."""
    for step in damaged:
        target = (run / "checkpoints").resolve().parent / "damaged" / str(step)  # on the same disk
        target.parent.mkdir(exist_ok=True)
        if target.exists():  # the same step, damaged once more
            shutil.rmtree(target)
        os.replace(run / "checkpoints" / str(step), target)
        print(f"Moved the damaged checkpoint of step {step} to {target}")


def delete_unfinished(run: Path) -> None:
    """Delete what killed processes left half written; its owner holds the run's lock."""
    for folder in (run / "checkpoints").glob("*.orbax-checkpoint-tmp*/"):
        shutil.rmtree(folder, ignore_errors=True)


class _ChecksummedPath(atomicity.AtomicRenameTemporaryPath):
    """The folder that a checkpoint is written to: it gets its checksums, and then its name."""

    async def finalize(self) -> None:
        made, final = Path(self.get()), Path(self.get_final())
        if not final.name.isdecimal():  # an item within it
            await super().finalize()
            return
        write_checksums(made, _beside(final.parent.parent))
        move_to_the_disk(made, final)


class _WorthKeeping(policies.PreservationPolicy):
    """Keeps the checkpoint with the lowest evaluation loss, and the last before steps that are not finite."""

    def __init__(self):
        self.losses: dict[int, float] = {}  # of evaluations, by step
        self.nonfinite_since: int | None = None  # the first of the steps in a row, up to now, that are not finite

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [found.step for found in checkpoints]
        best = min(((self.losses[step], step) for step in steps if step in self.losses), default=(None, None))[1]
        since = self.nonfinite_since
        replayed_from = max((step for step in steps if since is not None and step < since), default=None)
        return [step in (best, replayed_from) for step in steps]


MOST_POOL_ROWS, MOST_TOKENS = 1 << 16, 1 << 28
"""Of a data position: far beyond `POOL_ROWS`, and the tokens of the longest document that may be left."""


class SavedCheckpoint:
    """One checkpoint of a run, to read from: `choose_checkpoint` says which one is sound."""

    def __init__(self, run: Path, step: int):
        self._folder = run / "checkpoints" / str(step)
        self.step = step

    @property
    def has_training(self) -> bool:
        """Whether it holds more than weights."""
        return (self._folder / "training").is_dir()

    def weights(self, config: ModelConfig, shardings: Weights | None = None) -> Weights:
        """Its weights, where `shardings` says; None: on the first device.

        Raises:
            UserError: they cannot be read.
        """
        _, params, routing_bias = abstract_model(config)
        restored = self._restore(weights=_targets(Weights(params, routing_bias), shardings)._asdict())
        return Weights(**restored["weights"])

    def state(self, config: TrainConfig, shardings: TrainState | None = None) -> tuple[TrainState, Training | None]:
        """Its state, and the rest of what it holds to go on with; None for a checkpoint of weights alone.

        The state has the form of one device, and lies where `shardings` says (None: on the first device).

        Raises:
            UserError: it cannot be read.
        """
        wanted = None if shardings is None else Weights(shardings.params, shardings.routing_bias)
        weights = self.weights(config.model, wanted)
        training = self.training(config, shardings)
        if training is None:
            start = functools.partial(start_state, config)
            return (start if shardings is None else jax.jit(start, out_shardings=shardings))(*weights), None
        return TrainState(*weights, training.opt_state, training.step, training.dropout_key), training

    def training(self, config: TrainConfig, shardings: TrainState | None = None) -> Training | None:
        """What it holds beside the weights; None where that is nothing.

        It lies where `shardings` says (None: on the first device).

        Raises:
            UserError: it cannot be read.
        """
        if not self.has_training:
            return None
        targets = _targets(jax.eval_shape(lambda: init_state(config)), shardings)
        training = {"opt_state": targets.opt_state, "step": targets.step, "dropout_key": targets.dropout_key}
        names, rows = _stream_items(config.data_streams or 1)
        targets = {row: self._shapes_of_rows(row, config.seq_len) for row in rows}
        restored = self._restore(training=training, **targets, **dict.fromkeys((*names, "journal")))
        positions = []
        try:
            for name, row in zip(names, rows, strict=True):
                arrays = jax.tree.map(np.asarray, restored[row])
                source, drawn = restored[name]["source"], restored[name]["drawn"]
                positions.append(Position(source, drawn, tokens=arrays["tokens"][1:], pool=arrays["pool"]))
            journal = Journal.from_json(restored["journal"])
        except (KeyError, TypeError, IndexError) as error:
            raise self._unreadable(error) from None
        for position in positions:
            check_fits(position, str(self._folder), config.seq_len, config.model.vocab_size)
        return Training(**restored["training"], positions=positions, journal=journal)

    def _shapes_of_rows(self, item: str, seq_len: int) -> dict[str, np.ndarray]:
        """What the rows of a data stream are restored into, by the checkpoint's word where that makes sense.

        A few bytes can claim any shape: it is looked at before memory is taken for it.
        """
        try:
            found = ocp.StandardCheckpointHandler().metadata(epath.Path((self._folder / item).absolute()))
            shapes = {name: tuple(found[name].shape) for name in ("pool", "tokens")}
        except Exception as error:  # as in `_restore`
            raise self._unreadable(error) from None
        pool, tokens = shapes["pool"], shapes["tokens"]
        if (
            len(pool) != 2
            or pool[0] > MOST_POOL_ROWS
            or pool[1] != seq_len
            or len(tokens) != 1
            or tokens[0] > MOST_TOKENS
        ):
            raise UserError(
                f"the checkpoint {self._folder} has rows of the shapes {pool} and {tokens}: they are no rows"
            )
        return {name: np.empty(shape, np.int32) for name, shape in shapes.items()}

    def _restore(self, **targets: Pytree) -> dict[str, Any]:
        args = {
            name: ocp.args.JsonRestore() if _is_json(name) else ocp.args.StandardRestore(target)
            for name, target in targets.items()
        }
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                return dict(checkpointer.restore(self._folder.absolute(), args=ocp.args.Composite(**args)))
        except Exception as error:  # orbax, tensorstore and the file system raise kinds of their own
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(
            f"the checkpoint {self._folder} cannot be read ({one_line(error)}): "
            "delete that folder to use the one before it"
        )


def _reason(error: Exception) -> str:
    """What the system says, where tensorstore hands it on at the end of a long message; or the first line."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else one_line(error)


@functools.cache
def _say_errors_once() -> None:
    """An error of writing is raised, and becomes one line: orbax and tensorstore shall not print it beside that."""
    logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "was never retrieved" not in record.getMessage())
    hook_before = sys.unraisablehook

    def hook(unraisable) -> None:
        # what tensorstore still finds wrong in files of a save that has failed already
        if str(unraisable.exc_value) != "Event loop is closed":
            hook_before(unraisable)

    sys.unraisablehook = hook


class Checkpoints:
    """Writes the checkpoints of one run, in the background; `close` waits for the last.

    Args:
        run: its folder.
        keep: how many of the newest stay; None: all. The one with the lowest evaluation loss stays beside them.
        keep_every: also those whose step is a multiple of this stay; 0: none.
    """

    def __init__(self, run: Path, *, keep: int | None = None, keep_every: int = 0):
        self._folder = run / "checkpoints"
        self._worth_keeping = _WorthKeeping()
        kept = [policies.LatestN(keep), self._worth_keeping]
        kept += [policies.EveryNSteps(keep_every)] if keep_every else []
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            temporary_path_class=_ChecksummedPath,
        )
        self._writing: int | None = None  # the step that is on its way to the disk
        _say_errors_once()
        with self._to_the_disk():
            self._manager = ocp.CheckpointManager(epath.Path(self._folder.absolute()), options=options)

    def save(self, step: int, state: TrainState, positions: Sequence[Position], journal: Journal) -> None:
        """Save a state in the form of one device (`parallel.unplaced`), over however many it is spread.

        Of a run of several processes all save, each with the positions of all data streams.

        Raises:
            UserError: this checkpoint, or the one before it, cannot be written.
        """
        items: dict[str, Any] = {"journal": ocp.args.JsonSave(journal.to_json())}
        for name, rows, position in zip(*_stream_items(len(positions)), positions, strict=True):
            items[name] = ocp.args.JsonSave({"source": position.source, "drawn": position.drawn})
            items[rows] = ocp.args.StandardSave({"pool": position.pool, "tokens": _with_length(position.tokens)})
        training = {"opt_state": state.opt_state, "step": state.step, "dropout_key": state.dropout_key}
        in_a_row = journal.nonfinite_in_a_row
        self._worth_keeping.losses = journal.evaluations()
        self._worth_keeping.nonfinite_since = step - in_a_row + 1 if in_a_row else None
        self._save(step, weights=Weights(state.params, state.routing_bias), training=training, **items)

    def save_weights(self, weights: Weights) -> None:
        """Save weights alone, as step 0."""
        self._save(0, weights=weights)

    def wait(self) -> None:
        """Wait until what was saved is on the disk.

        Raises:
            UserError: it cannot be written.
        """
        with self._to_the_disk():
            self._manager.wait_until_finished()
            self._writing = None

    def close(self) -> None:
        """Wait for the last save; of one that failed `wait` or `save` has told."""
        with contextlib.suppress(UserError):
            self.wait()
        with contextlib.suppress(Exception):  # orbax tells once more what it has told
            self._manager.close()

    def _save(self, step: int, weights: Weights, **items: Any) -> None:
        self.wait()
        args = {
            name: item if isinstance(item, ocp.args.CheckpointArgs) else ocp.args.StandardSave(item)
            for name, item in items.items()
        }
        self._writing = step
        with self._to_the_disk():
            items = ocp.args.Composite(weights=ocp.args.StandardSave(weights._asdict()), **args)
            saved = self._manager.save(step, args=items)
        if not saved:
            raise UserError(f"{self._folder} holds a checkpoint of step {step} or later: nothing is written over it")

    @contextlib.contextmanager
    def _to_the_disk(self) -> Iterator[None]:
        """Turns whatever goes wrong in writing into one line."""
        try:
            yield
        except Exception as error:  # orbax, tensorstore and the file system raise kinds of their own
            what = self._folder if self._writing is None else f"the checkpoint {self._folder / str(self._writing)}"
            raise UserError(
                f"{what} cannot be written ({_reason(error)}): the checkpoints before it are as they were; "
                "make room or pass another --run-dir, and run again"
            ) from None


def _stream_items(streams: int) -> tuple[list[str], list[str]]:
    """Names of the items that keep the position and the rows of each data stream."""
    ends = ["", *(f"_{s}" for s in range(1, streams))]
    return [f"position{end}" for end in ends], [f"rows{end}" for end in ends]


def _is_json(item: str) -> bool:
    return item == "journal" or item.startswith("position")


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
    try:
        if training is None:
            checkpoints.save_weights(weights)
        else:
            config, reached = training
            write_json(folder / "train_config.json", config.to_dict())
            state = TrainState(*weights, reached.opt_state, reached.step, reached.dropout_key)
            checkpoints.save(int(reached.step), state, reached.positions, reached.journal)
        checkpoints.wait()
    finally:
        checkpoints.close()


def check_room(config: TrainConfig) -> None:
    """Whether one more checkpoint of a run has room on its disk.

    Raises:
        UserError: it has not.
    """
    run, state = config.folder, jax.eval_shape(lambda: init_state(config))
    needed, free = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)), shutil.disk_usage(run).free
    if free < needed:
        raise UserError(
            f"run_dir is {str(run)!r}: a checkpoint takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free "
            "there: make room or pass another --run-dir"
        )


def newest_checkpoint(run: Path) -> SavedCheckpoint:
    """The newest sound checkpoint of a run folder.

    Raises:
        UserError: it is no run, or there is none.
    """
    if not is_run(run):
        raise UserError(f"{str(run)!r} is no run: it holds no folder checkpoints")
    step = choose_checkpoint(run).step
    if step is None:
        raise UserError(f"{run / 'checkpoints'} holds no complete checkpoint")
    return SavedCheckpoint(run, step)


def load_weights(run: Path) -> tuple[ModelConfig, Weights]:
    """Model config and newest weights of a run folder.

    Raises:
        UserError: it is no run, or the checkpoint cannot be read.
    """
    config = read_model_config(run)
    return config, newest_checkpoint(run).weights(config)
