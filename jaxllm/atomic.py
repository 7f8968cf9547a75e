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
