"""Files: written whole or not at all, read only within bounds; JSON; the cache folder."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxllm.errors import UserError, shown

StrPath = str | os.PathLike[str]
"""A path, in functions that users call."""

_PLAIN = re.compile(r"[\w/.,=+@~-]*", re.ASCII)

MAX_JSON_BYTES = 8 * 2**20
"""Largest config file or weights index that is read."""


def write_text_atomically(file: Path, text: str) -> None:
    """Replace or create a file: a reader, also after a crash, finds the old content or the new one, never a part.

    The folder must exist. A pipe or a device is written to directly.
    """
    if file.exists() and not file.is_file():
        file.write_text(text, encoding="utf-8")
        return
    # A scratch folder: no other process knows the name, and the file gets the usual permissions.
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as scratch:
        part = Path(scratch) / file.name
        with part.open("w", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())  # else a power cut could leave the new name on bytes that were never written
        os.replace(part, file)
        fsync_folder(file.parent)


def delete_leftovers(folder: Path) -> None:
    """Delete what killed processes left of files they were writing: folders `.NAME.xxxxxxxx` with NAME, or empty."""
    for path in folder.glob(".*.*/"):
        name = path.name[1:].rpartition(".")[0]
        if re.fullmatch(r".+\.[a-z0-9_]{8}", path.name) and {part.name for part in path.iterdir()} <= {name}:
            shutil.rmtree(path, ignore_errors=True)


def rename_durably(made: Path, name: Path) -> None:
    """Fsync everything below the folder `made`, then rename it atomically to `name`."""
    for folder, _, files in os.walk(made, topdown=False):
        for file in files:
            with Path(folder, file).open("rb+") as opened:
                os.fsync(opened.fileno())
        fsync_folder(Path(folder))
    os.replace(made, name)
    fsync_folder(name.parent)


def fsync_folder(folder: Path) -> None:
    """Flush the directory entries of a folder, where the system allows opening one."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """An absolute path of a folder, for libraries that find wildcards in a path or need it to be UTF-8.

    It is a symbolic link in a temporary folder where the path has other characters than those of `_PLAIN`.
    """
    folder = folder.absolute()
    if _PLAIN.fullmatch(str(folder)):
        yield folder
        return
    plain_root = tempfile.gettempdir() if _PLAIN.fullmatch(tempfile.gettempdir()) else "/tmp"
    with tempfile.TemporaryDirectory(prefix="jaxllm-", dir=plain_root) as private:
        link = Path(private) / "folder"
        link.symlink_to(folder, target_is_directory=True)
        yield link


def check_file(path: Path, max_bytes: int | None = None) -> None:
    """Raise a UserError unless a path is a regular file (or a symlink to one) of at most `max_bytes`. A pipe would
    block forever."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"cannot read {path}: it is a folder, a pipe or a device, and a file is expected")
    if max_bytes is not None and status.st_size > max_bytes:
        raise _too_large(path, status.st_size, max_bytes)


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The content of a file. Raises a UserError if it cannot be read, or has more than `max_bytes`."""
    check_file(path, max_bytes)
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > max_bytes:  # it grew, or its size is not known in advance, as in /proc
        raise _too_large(path, len(content), max_bytes)
    return content


def _too_large(path: Path, size: int, max_bytes: int) -> UserError:
    return UserError(f"{path} has {size} bytes or more: a file of its kind has at most {max_bytes}; create it again")


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object. Raises a UserError if the file cannot be read, is larger, or holds something else."""
    content = read_bounded(path, max_bytes)
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=unique_keys)
        if re.search(rb"\\u[dD][89a-fA-F]", content):  # a lone surrogate is valid in no file name and no token
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` that refuses duplicate keys: parsers disagree on which one wins."""
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {shown(duplicate)} occurs twice in an object")
    return values


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically."""
    write_text_atomically(path, json.dumps(value, indent=2) + "\n")


def sha256_of(file: Path) -> str:
    """The checksum of a file's content, read in parts."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def cache_folder(name: str) -> Path:
    """The subfolder `name` of the cache, created if needed.

    The cache is $JAXLLM_CACHE_DIR, else $XDG_CACHE_HOME/jaxllm, else ~/.cache/jaxllm.

    Raises:
        OSError: nothing can be written there.
    """
    if "JAXLLM_CACHE_DIR" in os.environ:
        root = Path(os.environ["JAXLLM_CACHE_DIR"]).expanduser()
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxllm"
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return folder


def cache_file(folder: str, name: str) -> Path | None:
    """A file in a subfolder of the cache, which may not be there yet; None: nothing can be written there."""
    try:
        return cache_folder(folder) / name
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder
        return None
