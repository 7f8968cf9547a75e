"""Writing a file so that whoever reads it, now or after a crash, finds the old one or the new one, never a part."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_text_atomically(file: Path, text: str) -> None:
    """Replace a file, or make it. Its folder must exist; a pipe or a device is written to as it is."""
    if file.exists() and not file.is_file():
        file.write_text(text, encoding="utf-8")
        return
    # In a folder of its own, for no other process knows the name, and the file gets the usual permissions.
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as scratch:
        part = Path(scratch) / file.name
        with part.open("w", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())  # else a power cut could leave the new name on bytes that were never written
        os.replace(part, file)
        sync_folder(file.parent)


def move_to_the_disk(made: Path, name: Path) -> None:
    """Give a folder that was made its name, behind everything in it: what has the name is whole, whatever happens."""
    for folder, _, files in os.walk(made, topdown=False):
        for file in files:
            with Path(folder, file).open("rb+") as opened:
                os.fsync(opened.fileno())
        sync_folder(Path(folder))
    os.replace(made, name)
    sync_folder(name.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system lets a folder be opened for that."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
