"""The base of a run with adapters: the folder of its frozen weights, which no checkpoint holds, and their hash.

Imports neither JAX nor PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxllm.errors import UserError
from jaxllm.files import read_json

BASE_FILE = "base.json"
"""In the folder of a run with adapters."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def base_of(folder: Path) -> dict[str, Any]:
    """What BASE_FILE holds for a folder of weights, or a single file: its path, and the hash of all bytes of weights.

    Raises:
        UserError: there are no weights.
    """
    files = dict(_weight_files(folder))
    if not files:
        raise UserError(f"init is {str(folder)!r}: it holds no weights ({', '.join(_WEIGHTS)})")
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1)) as pool:
        hashes = dict(zip(files, pool.map(_sha256, files.values()), strict=True))
    return {"folder": str(folder), "sha256": hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()}


def check_there(run: Path, folder: Path | None) -> None:
    """Check that the folder of a run's base, or its single file, is there.

    Raises:
        UserError: it is not, or the run has no base.
    """
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


def check_base(run: Path, folder: Path) -> None:
    """Compare the weights in a folder with the base of a run.

    Raises:
        UserError: they are others than those that its adapters were trained with.
    """
    before, base = read_json(run / BASE_FILE), base_of(folder)
    if base["sha256"] != before.get("sha256"):
        raise UserError(
            f"init is {base['folder']!r}: its weights are not those that the adapters in {run} were trained on, which "
            f"were in {before.get('folder')!r}; pass --init with a folder that holds those"
        )


def base_hash(run: Path) -> str | None:
    """The hash of a run's base; None: it has none."""
    file = run / BASE_FILE
    return read_json(file).get("sha256") if file.is_file() else None


def _weight_files(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in [folder] if folder.is_file() else sorted(folder.iterdir()) if folder.is_dir() else []:
        if file.suffix in _WEIGHTS and file.is_file():
            yield file.name, file


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
