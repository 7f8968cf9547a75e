"""Where results are kept that would come out the same in the next run: compiled programs and trained tokenizers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder `name` of the cache, made if need be: in $JAXLLM_CACHE_DIR, else $XDG_CACHE_HOME/jaxllm, else
    ~/.cache/jaxllm.

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
