"""The checkpoints of a PyTorch run: the folders `checkpoint-STEP` that transformers' Trainer writes, found and checked.

model.safetensors, config.json, modeling_customllm.py   the model, as `from_pretrained` reads it
optimizer.pt, scheduler.pt, rng_state.pth               read with `weights_only`: nothing in them is executed
data_position.safetensors                               where the data goes on (jaxllm.data.position)
trainer_state.json                                      written last: without it the checkpoint is incomplete
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from jaxllm.data.corpus import one_line
from jaxllm.data.position import POSITION_FILE
from jaxllm.errors import UserError

# Without one of these the numbers of a resumed run would be others; the random state is missing after a conversion.
NEEDED = ("config.json", "optimizer.pt", "scheduler.pt", POSITION_FILE)


class Checkpoint(NamedTuple):
    folder: Path
    step: int  # updates done


def last_checkpoint(run: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run; one that a killed process left half written is passed over.

    Raises:
        UserError: it lacks a file.
    """
    found = [Checkpoint(folder, steps_done(folder)) for folder in run.glob("checkpoint-*/")]
    complete = [checkpoint for checkpoint in found if checkpoint.step is not None]
    if not complete:
        return None
    newest = max(complete, key=lambda checkpoint: checkpoint.step)
    if missing := [name for name in NEEDED if not (newest.folder / name).is_file()]:
        raise UserError(
            f"the checkpoint {newest.folder} lacks {', '.join(missing)}: delete that folder to use the one before it"
        )
    return newest


def steps_done(folder: Path) -> int | None:
    """How many updates a checkpoint's `trainer_state.json` counts; None where it is not there or not whole."""
    try:
        step = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


@contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Turns whatever goes wrong while a checkpoint is read into one line.

    Raises:
        UserError: something went wrong.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch, pickle, safetensors and the file system raise kinds of their own
        raise UserError(
            f"the checkpoint {folder} cannot be read ({one_line(error)}): delete that folder to use the one before it"
        ) from None
