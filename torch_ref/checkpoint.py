"""Finds and checks the checkpoints of a PyTorch run: the folders `checkpoint-STEP` that transformers' Trainer writes.

model.safetensors, config.json, modeling_customllm.py   the model, as `from_pretrained` reads it
optimizer.pt, scheduler.pt, rng_state.pth               read with `weights_only`: no code in them is executed
data_position.safetensors                               the position in the data (jaxllm.data.stream)
trainer_state.json                                      written last: without it the checkpoint is incomplete

Of `trainer_state.json` the Trainer needs `global_step` and `train_batch_size`.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.config import MAX_INT
from jaxllm.data.stream import POSITION_FILE
from jaxllm.errors import UserError, as_user_error, one_line
from jaxllm.files import StrPath, read_json

OPTIMIZER_FILE, SCHEDULER_FILE, STATE_FILE = "optimizer.pt", "scheduler.pt", "trainer_state.json"

# Without any of these a resumed run would change its numbers. A converted run has no random state.
NEEDED = ("config.json", OPTIMIZER_FILE, SCHEDULER_FILE, POSITION_FILE)
MAX_STATE_BYTES = 64 * 2**20  # of `trainer_state.json`, which grows with each log record


class Checkpoint(NamedTuple):
    folder: Path
    step: int  # updates done


def last_checkpoint(run: StrPath) -> Checkpoint | None:
    """The newest complete checkpoint of a run; a partly written one is skipped. Raises UserError if it lacks a file."""
    states = [(folder, trainer_state(folder)) for folder in Path(run).glob("checkpoint-*/")]
    complete = [(state["global_step"], folder, state) for folder, state in states if state is not None]
    if not complete:
        return None
    step, folder, state = max(complete, key=lambda found: found[0])
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    missing += [] if _is_count(state.get("train_batch_size")) else ["train_batch_size in trainer_state.json"]
    if missing:
        raise UserError(
            f"the checkpoint {folder} lacks {', '.join(missing)}: move the folder elsewhere to use the one before it"
        )
    return Checkpoint(folder, step)


def trainer_state(folder: StrPath) -> dict[str, Any] | None:
    """A checkpoint's `trainer_state.json`; None if it is missing, incomplete or without a step count."""
    try:
        state = read_json(Path(folder, STATE_FILE), MAX_STATE_BYTES)
    except UserError:
        return None
    return state if _is_count(state.get("global_step")) else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INT


def reading(folder: StrPath) -> AbstractContextManager[None]:
    """Turns any error while a checkpoint is read into a UserError of one line."""
    remedy = "move the folder elsewhere to use the one before it"
    return as_user_error(lambda error: f"the checkpoint {folder} cannot be read ({one_line(error)}): {remedy}")
