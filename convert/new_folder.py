"""The folder that a conversion writes: whole, or not there."""

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock

from jaxllm.errors import UserError
from jaxllm.files import StrPath, rename_durably
from jaxllm.store.lock import LOCK_FILE


def check_new(out: StrPath) -> None:
    """Check that nothing would be overwritten.

    Raises:
        UserError: `out` is a file, a folder that is not empty or cannot be renamed to, or no place for a folder.
    """
    out = Path(out)
    if out.is_symlink() and not out.exists():
        raise UserError(f"{out} is a symlink to nothing: pass a new folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: pass a new folder")
    if out.exists() and (out.is_mount() or out.samefile(Path.cwd())):
        raise UserError(f"{out} is the current folder or a mount point: pass a new folder in it")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{out} cannot be made: {parent} is not a folder that can be written to")


@contextlib.contextmanager
def new_folder(out: StrPath) -> Iterator[Path]:
    """A folder to write to, which is durably renamed to `out` at the end, and deleted after an error.

    A process that is killed leaves a scratch folder `.OUT.xxxxxxxx` next to `out`: the next one for `out` deletes it.

    Raises:
        UserError: as `check_new`, or another process writes the same folder.
    """
    check_new(out)
    out = Path(out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    _delete_leftovers(out)
    with (
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch,
        filelock.FileLock(Path(scratch) / LOCK_FILE),
    ):
        made = Path(scratch) / out.name
        made.mkdir()
        yield made
        check_new(out)
        rename_durably(made, out)


def _delete_leftovers(out: Path) -> None:
    for scratch in out.parent.glob(f".{glob.escape(out.name)}.{'[a-z0-9_]' * 8}/"):
        if {path.name for path in scratch.iterdir()} <= {out.name, LOCK_FILE}:
            try:
                with filelock.FileLock(scratch / LOCK_FILE, timeout=0):
                    shutil.rmtree(scratch / out.name, ignore_errors=True)
            except filelock.Timeout:
                raise UserError(f"{out}: another process writes it: wait, or pass a new folder") from None
            shutil.rmtree(scratch, ignore_errors=True)
