"""A corpus's files by name and size, in few enough characters to be part of every data position.

A run resumes only with the data that it was started on: other files would silently change the rest of the pass.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from jaxllm.errors import UserError

NAMED_FILES = 4096
"""Files with separate characters, which show the first one that differs."""

_CHARS = 4


class Fingerprint:
    """Of files in their order, by their names relative to their common folder."""

    def __init__(self, files: list[Path], sizes: list[int]):
        self._folder = files[0].parent if len(files) == 1 else Path(os.path.commonpath([file.parent for file in files]))
        self._names = [file.relative_to(self._folder).as_posix() for file in files]
        entries = [f"{name}\0{size}\0".encode() for name, size in zip(self._names, sizes, strict=True)]
        each = (hashlib.sha256(entry).hexdigest()[:_CHARS] for entry in entries[:NAMED_FILES])
        self.value: dict[str, Any] = {
            "count": len(files),
            "all": hashlib.sha256(b"".join(entries)).hexdigest()[:32],
            "each": "".join(each),
        }

    def check(self, saved: dict[str, Any]) -> None:
        """Compare with the value in a data position. Raises UserError if the files are others."""
        if saved["all"] != self.value["all"]:
            raise UserError(
                f"data: the files of {str(self._folder)!r} are not those that the run was started on "
                f"({saved['count']} then, {self.value['count']} now; first difference: {self._difference(saved)}): "
                "pass the old data, or --overwrite to start over"
            )

    def _difference(self, saved: dict[str, Any]) -> str:
        before, now = _split(saved["each"]), _split(self.value["each"])
        same = 0
        while same < min(len(before), len(now)) and before[same] == now[same]:
            same += 1
        if same == NAMED_FILES:
            return f"after the first {same}"
        if same == len(now):
            return f"one after {self._names[-1]} is gone"
        name = self._names[same]
        if len(before) > len(now) and before[same + 1] == now[same]:
            return f"one before {name} is gone"
        if len(before) < len(now) and (same == len(before) or before[same] == now[same + 1]):
            return f"{name} is new"
        return f"{name} is new or has another size"


def _split(each: str) -> list[str]:
    return [each[i : i + _CHARS] for i in range(0, len(each), _CHARS)]
