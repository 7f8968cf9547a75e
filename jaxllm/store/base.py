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


def check_base(run: Path, base: dict[str, Any]) -> None:
    """Compare with the base of a run.

    Raises:
        UserError: the weights are others than those that its adapters were trained with.
    """
    before = read_json(run / BASE_FILE)
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
