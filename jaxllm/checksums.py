"""What a checkpoint was when it was written: size and SHA-256 of each file, in a list that is part of the checkpoint.

The list is written last, before the folder gets its name. So a checkpoint without it was never finished, and whatever
has happened to one since is found before anything in it is read as good.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

CHECKSUMS_FILE = "checksums.json"

MAX_LIST_BYTES = 64 << 20
"""No list is longer: a checkpoint of a hundred thousand files has one of 15 MB."""


def write_checksums(folder: Path, beside: dict[str, Any]) -> None:
    """Bring every file of a folder to the disk, and the list of them, with the JSON values `beside` in it."""
    files = {}
    for name, file in sorted(_files(folder).items()):
        with file.open("rb+") as opened:
            files[name] = {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}
            os.fsync(opened.fileno())
    listed = beside | {"files": files}
    with (folder / CHECKSUMS_FILE).open("w", encoding="utf-8") as opened:
        json.dump({"sha256": _of_list(listed), "list": listed}, opened, indent=1)
        opened.flush()
        os.fsync(opened.fileno())


def read_list(folder: Path) -> dict[str, Any] | None:
    """What `write_checksums` wrote; None where that is missing or damaged."""
    file = folder / CHECKSUMS_FILE
    try:
        if not file.is_file() or file.stat().st_size > MAX_LIST_BYTES:
            return None
        written = json.loads(file.read_bytes())
        listed = written["list"]
        whole = written["sha256"] == _of_list(listed) and isinstance(listed["files"], dict)
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return listed if whole else None


def _of_list(listed: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def find_damage(folder: Path) -> str | None:
    """What is wrong with the first file that is not as it was written; None if all are."""
    listed = read_list(folder)
    if listed is None:
        return f"{CHECKSUMS_FILE} is missing or damaged"
    files = _files(folder)  # only what lies here is opened, whatever the list may name
    for name, wanted in listed["files"].items():
        if name not in files:
            return f"{name} is missing"
        if not isinstance(wanted, dict):
            return f"{CHECKSUMS_FILE} is missing or damaged"
        try:
            size = files[name].stat().st_size
            if size != wanted.get("bytes"):
                return f"{name} has {size} bytes instead of {wanted.get('bytes')}"
            with files[name].open("rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != wanted.get("sha256"):
                    return f"{name} has another checksum than when it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _files(folder: Path) -> dict[str, Path]:
    """The files below a folder by their relative names; links are none of them."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            file = Path(parent, name)
            if not file.is_symlink() and file.is_file():
                found[file.relative_to(folder).as_posix()] = file
    found.pop(CHECKSUMS_FILE, None)
    return found
