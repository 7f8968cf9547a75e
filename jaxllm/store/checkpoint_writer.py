"""Writing the checkpoints of a run in the background: each is whole, on disk and checksummed before it has its name."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.path import atomicity

from jaxllm.config import ModelConfig, RunConfig
from jaxllm.console import silence_reported_errors
from jaxllm.errors import UserError, one_line
from jaxllm.files import StrPath, plain_path, rename_durably, write_json
from jaxllm.model.dtypes import check_floats
from jaxllm.store.checkpoint import ResumeState, Weights
from jaxllm.store.checksums import checkpoint_context, write_checksums
from jaxllm.store.folder import CHECKPOINTS, CONFIG_FILE, MODEL_FILE
from jaxllm.store.history import History
from jaxllm.store.source import SourceFiles
from jaxllm.train.state import TrainState

METADATA_SECONDS = 5.0
"""How long orbax's own description of a checkpoint is waited for; it is written within milliseconds."""


class _ChecksummedFolder(atomicity.AtomicRenameTemporaryPath):
    """The folder that a checkpoint is written to: it is found to be readable, gets its checksums, then its name."""

    async def finalize(self) -> None:
        made, final = Path(self.get()), Path(self.get_final())
        if not final.name.isdecimal():  # an item within it
            await super().finalize()
            return
        # Where orbax could not merge what the processes wrote, it says nothing: open every array.
        for item in {part.parent for part in made.glob("*/ocdbt.process_*/")}:
            await asyncio.to_thread(ocp.StandardCheckpointHandler().metadata, epath.Path(item))
        deadline = time.monotonic() + METADATA_SECONDS
        while not _names_its_items(made) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        write_checksums(made, checkpoint_context(final.parent.parent))
        rename_durably(made, final)


def _names_its_items(checkpoint: Path) -> bool:
    """Whether orbax, which does so in a thread that it does not wait for, has written its description for the second,
    last time: else the checksums would be those of the first one."""
    try:
        return bool(json.loads((checkpoint / "_CHECKPOINT_METADATA").read_bytes()).get("item_handlers"))
    except (OSError, ValueError):  # not there, or half written
        return False


class KeepBest(policies.PreservationPolicy):
    """Keeps the checkpoint with the lowest evaluation loss, and the last before steps that are not finite."""

    def __init__(self):
        self.losses: dict[int, float] = {}  # finite evaluation losses by step
        self.nonfinite_since: int | None = None  # the first of the last steps in a row that are not finite

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [found.step for found in checkpoints]
        best = min(((self.losses[step], step) for step in steps if step in self.losses), default=(None, None))[1]
        since = self.nonfinite_since
        replayed_from = max((step for step in steps if since is not None and step < since), default=None)
        return [step in (best, replayed_from) for step in steps]


class CheckpointWriter:
    """Writes the checkpoints of one run in the background; `close` waits for the last.

    Args:
        run: its folder.
        keep: how many of the newest are kept; None: all. The one with the lowest evaluation loss is kept as well.
        keep_every: checkpoints whose step is a multiple of this are kept too; 0: none.
    """

    def __init__(self, run: StrPath, *, keep: int | None = None, keep_every: int = 0):
        self._folder = Path(run, CHECKPOINTS)
        self._keep_best = KeepBest()
        kept = [policies.LatestN(keep), self._keep_best]
        kept += [policies.EveryNSteps(keep_every)] if keep_every else []
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept), temporary_path_class=_ChecksummedFolder
        )
        self._writing: int | None = None  # the step that is being written
        silence_reported_errors()
        self._cleanup = contextlib.ExitStack()
        with self._storage_errors():
            alias = self._cleanup.enter_context(plain_path(Path(run)))
            self._manager = ocp.CheckpointManager(epath.Path(alias / CHECKPOINTS), options=options)

    def save(self, step: int, state: TrainState, positions: Sequence[bytes], history: History) -> None:
        """Save a state in the form of one device (`Trainer.unshard`), over however many devices it is spread.

        In a run of several processes all save, each with the encoded positions of all data streams.

        Raises:
            UserError: this checkpoint, or the one before it, cannot be written.
        """
        in_a_row = history.nonfinite_in_a_row
        self._keep_best.losses = {int(s): loss for s, loss in history.evaluations.items() if np.isfinite(loss)}
        self._keep_best.nonfinite_since = step - in_a_row + 1 if in_a_row else None
        encoded = {str(s): np.frombuffer(position, np.uint8) for s, position in enumerate(positions)}
        self._save(
            step,
            weights=ocp.args.StandardSave(Weights(state.params, state.routing_bias)._asdict()),
            training=ocp.args.StandardSave(
                {"opt_state": state.opt_state, "step": state.step, "dropout_key": state.dropout_key}
            ),
            positions=ocp.args.StandardSave(encoded),
            history=ocp.args.JsonSave(history.to_json()),
        )

    def save_weights(self, weights: Weights) -> None:
        """Save weights alone, as step 0."""
        self._save(0, weights=ocp.args.StandardSave(weights._asdict()))

    def wait(self) -> None:
        """Wait until what was saved is on disk. Raises a UserError if it cannot be written."""
        with self._storage_errors():
            self._manager.wait_until_finished()
            self._writing = None

    def close(self) -> None:
        """Wait for the last save. Save errors were already raised by `wait` or `save`."""
        with contextlib.suppress(UserError):
            self.wait()
        with contextlib.suppress(Exception):  # orbax re-raises the error
            self._manager.close()
        self._cleanup.close()

    def _save(self, step: int, **items: ocp.args.CheckpointArgs) -> None:
        self.wait()
        self._writing = step
        with self._storage_errors():
            saved = self._manager.save(step, args=ocp.args.Composite(**items))
        if not saved:
            raise UserError(f"{self._folder} holds a checkpoint of step {step} or later: it is not overwritten")

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """Turns whatever goes wrong while writing into one line."""
        try:
            yield
        except Exception as error:  # orbax, tensorstore and the file system raise kinds of their own
            what = self._folder if self._writing is None else f"the checkpoint {self._folder / str(self._writing)}"
            raise UserError(
                f"{what} cannot be written ({_reason(error)}): the checkpoints before it are unchanged; "
                "free space or pass another --run-dir, and run again"
            ) from None


def _reason(error: Exception) -> str:
    """The system's message, where tensorstore has its code at the end of a long one; or the first line."""
    code = re.search(r"os_error_code='(\d+)'|\[Errno (\d+)\]", str(error))
    return os.strerror(int(code[1] or code[2])) if code else one_line(error)


def write_run(
    folder: StrPath,
    model: ModelConfig,
    weights: Weights,
    training: tuple[RunConfig, ResumeState] | None = None,
    kept: SourceFiles | None = None,
) -> None:
    """Create a run folder that starts from given weights or, with `training`, resumes where they were reached.

    `kept` are the files that came with the weights.

    Raises:
        UserError: a weight or a moment is not a floating-point number; or a weight without `training` is not finite.
    """
    folder, state = Path(folder), None
    if training is not None:
        reached = training[1]
        state = TrainState(*weights, reached.opt_state, reached.step, reached.dropout_key)
    moments = () if state is None else state.opt_state[1:]
    for path, leaf in jax.tree.leaves_with_path((tuple(weights), moments)):
        check_floats(jax.tree_util.keystr(path[2:], simple=True, separator="."), leaf, finite=training is None)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MODEL_FILE, model.to_dict())
    if kept is not None:
        kept.write(folder)
    writer = CheckpointWriter(folder)
    try:
        if training is None or state is None:
            writer.save_weights(weights)
        else:
            config, reached = training
            write_json(folder / CONFIG_FILE, config.to_dict())
            positions = [position.to_bytes() for position in reached.positions]
            writer.save(int(reached.step), state, positions, reached.history)
        writer.wait()
    finally:
        writer.close()


def check_room(run: StrPath, state: TrainState) -> None:
    """Raise a UserError unless the disk has room for one more checkpoint of a run, with a state of these shapes."""
    leaves, free = jax.tree.leaves(state._replace(frozen={})), shutil.disk_usage(run).free
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    if free < needed:
        raise UserError(
            f"run_dir is {str(run)!r}: a checkpoint takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free "
            "there: free space or pass another --run-dir"
        )
