"""Checksums of a checkpoint: size and SHA-256 of each file, in a list that is part of the checkpoint.

The list is written last, before the folder gets its name. So a checkpoint without it was never finished, and later
damage is found before anything in the checkpoint is used.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from jaxllm.config import FORMAT
from jaxllm.errors import listed, shown
from jaxllm.files import StrPath, read_json, sha256_of
from jaxllm.store.base import base_hash
from jaxllm.store.folder import MODEL_FILE, TOKENIZER

CHECKSUMS_FILE = "checksums.json"

MAX_LIST_BYTES = 64 << 20
"""Largest list that is read: a checkpoint of a hundred thousand files has one of 15 MB."""


def checkpoint_context(run: StrPath) -> dict[str, Any]:
    """What a checkpoint depends on in its run's folder: the model's config, and the checksums of the tokenizer and of
    the weights that its adapters belong to."""
    config, tokenizer = Path(run, MODEL_FILE), Path(run, TOKENIZER, "tokenizer.json")
    return {
        "format": FORMAT,
        "model": read_json(config) if config.is_file() else None,
        "tokenizer": sha256_of(tokenizer) if tokenizer.is_file() else None,
        "base": base_hash(Path(run)),
    }


def write_checksums(folder: Path, context: dict[str, Any]) -> None:
    """Write the list of a folder's files, with its `checkpoint_context` in it."""
    found = sorted(_files(folder).items())
    files = {name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for name, file in found}
    whole = context | {"files": files}
    written = json.dumps({"sha256": _list_checksum(whole), "list": whole}, indent=1)
    (folder / CHECKSUMS_FILE).write_text(written, encoding="utf-8")


def read_list(folder: Path) -> dict[str, Any] | None:
    """What `write_checksums` wrote; None if it is missing or damaged."""
    file = folder / CHECKSUMS_FILE
    try:
        if not file.is_file() or file.stat().st_size > MAX_LIST_BYTES:
            return None
        written = json.loads(file.read_bytes())
        whole = {"format": 1, "base": None, **written["list"]}  # format 1 did not name itself
        types = {"files": dict, "model": dict | None, "tokenizer": str | None, "base": str | None, "format": int}
        valid = written["sha256"] == _list_checksum(written["list"])
        valid = valid and all(isinstance(whole[name], kind) for name, kind in types.items())
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return whole if valid else None


def _list_checksum(whole: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def find_damage(folder: Path) -> str | None:
    """What is wrong with the first file that has changed since it was written, or never was; None if nothing is."""
    if not (folder / CHECKSUMS_FILE).exists():
        return f"{CHECKSUMS_FILE} is missing: it was never finished, or is of an earlier version"
    whole = read_list(folder)
    if whole is None:
        return f"{CHECKSUMS_FILE} is damaged"
    files = _files(folder)  # only files in the folder are opened, whatever the list names
    for name, wanted in whole["files"].items():
        if name not in files:
            return f"{listed([name])} is missing"
        if not isinstance(wanted, dict):
            return f"{CHECKSUMS_FILE} is damaged"
        try:
            size = files[name].stat().st_size
            if size != wanted.get("bytes"):
                return f"{name} has {size} bytes instead of {shown(wanted.get('bytes'))}"
            if sha256_of(files[name]) != wanted.get("sha256"):
                return f"{name} has another checksum than when it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    # Each process writes a database; an item is read through the one that merges them.
    for part in folder.glob("*/ocdbt.process_*/"):
        if not (part.parent / "manifest.ocdbt").is_file():
            return f"{part.parent.name}/manifest.ocdbt was never written"
    return None


def _files(folder: Path) -> dict[str, Path]:
    """The regular files below a folder, without links, by their relative names."""
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    found = {path.relative_to(folder).as_posix(): path for path in paths if not path.is_symlink() and path.is_file()}
    found.pop(CHECKSUMS_FILE, None)
    return found
