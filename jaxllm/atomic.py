"""Files that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_text_atomically(file: Path, text: str) -> None:
    """Write a file, UTF-8, that has its old contents until it has all of the new ones."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as part:
            part.write(text)
            part.flush()
            os.fsync(part.fileno())
        os.chmod(name, 0o644)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
