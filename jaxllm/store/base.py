"""The base of a run with adapters: the hash of its frozen weights, which no checkpoint holds.

The run's config says where they are (`init`). Imports neither JAX nor PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxllm.errors import UserError
from jaxllm.files import read_json
from jaxllm.packages import check_own
from jaxllm.store.folder import CONFIG_FILE, read_model_config

BASE_FILE = "base.json"
"""In the folder of a run with adapters."""


def base_of(source: Path) -> dict[str, Any]:
    """What BASE_FILE holds for a folder of weights, or a single file: the hash of the files that are read of it.

    Raises:
        UserError: there are no weights, or no model.
    """
    check_own("convert")
    from convert.mtp import is_beyond
    from convert.weight_files import weight_files

    layers = read_model_config(source.parent if source.is_file() else source).num_hidden_layers
    files = {file.name: file for file in weight_files(source, lambda name: not is_beyond(name, layers)).files}
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1)) as pool:
        hashes = dict(zip(files, pool.map(_sha256, files.values()), strict=True))
    return {"sha256": hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()}


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
    if base_of(folder)["sha256"] != base_hash(run):
        before = read_json(run / CONFIG_FILE).get("init")
        raise UserError(
            f"init is {str(folder)!r}: its weights are not those that the adapters in {run} were trained on, which "
            f"were in {before!r}; pass --init with a folder that holds those"
        )


def base_hash(run: Path) -> str | None:
    """The hash of a run's base; None: it has none."""
    file = run / BASE_FILE
    return read_json(file).get("sha256") if file.is_file() else None


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
