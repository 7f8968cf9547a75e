"""The base of a run with adapters: the hash of its frozen weights, which no checkpoint holds.

The run's config says where they are (`init`). Imports neither JAX nor PyTorch.
"""

from __future__ import annotations

from pathlib import Path

from jaxllm.errors import UserError
from jaxllm.files import read_json

BASE_FILE = "base.json"
"""In the folder of a run with adapters: `sha256` of the base."""


def check_there(run: Path, folder: Path | None) -> None:
    """Raise a UserError unless a run has a base, and its folder or single file is there."""
    if not (run / BASE_FILE).is_file():
        raise UserError(
            f"lora_rank is not 0, and the run in {run} trains all weights: leave the option out to resume it, or pass "
            "another --run-dir"
        )
    if folder is None or not folder.exists():
        raise UserError(
            f"init is {str(folder)!r}, the base of the adapters in {run}, and there is nothing: put it back, or name "
            f"the folder where it is now: train.py --run-dir {run} --init FOLDER"
        )


def base_hash(run: Path) -> str | None:
    """The hash of a run's base; None: it has none."""
    file = run / BASE_FILE
    return read_json(file).get("sha256") if file.is_file() else None
