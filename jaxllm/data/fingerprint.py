"""A corpus's files by name and content, in few enough characters to be part of every data position.

A run resumes only with the data that it was started on: other files would silently change the rest of the pass.
"""

import functools
import hashlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxllm.errors import UserError, shown

NAMED_FILES = 4096
"""Files with separate characters, which show the first one that differs."""

READ_BYTES = 512 << 20
"""Bytes of a corpus that are read for its fingerprint, divided equally among its files."""

BLOCK = 64 << 10

_CHARS = 4


def content_digest(file: Path, files: int) -> str:
    """SHA-256 of a file's size and content, as one of `files` files.

    Of a file larger than its share of `READ_BYTES`, evenly spaced blocks are read. A file that is not there has an
    empty digest.
    """
    try:
        stat = file.stat()
        return _digest(file, stat.st_size, stat.st_mtime_ns, max(1, READ_BYTES // files // BLOCK))
    except OSError:
        return ""


@functools.cache
def _digest(file: Path, size: int, mtime_ns: int, blocks: int) -> str:
    """`mtime_ns` is part of the cache's key only: a copied file has another."""
    digest = hashlib.sha256(f"{size}".encode())
    with file.open("rb") as opened:
        for i in range(min(blocks, -(-size // BLOCK))):
            if size > blocks * BLOCK:
                opened.seek(i * (size - BLOCK) // max(1, blocks - 1))
            digest.update(opened.read(BLOCK))
    return digest.hexdigest()


class Fingerprint:
    """Of files in their order, by names and the digests of their content."""

    def __init__(self, names: list[str], digests: list[str]):
        self._names = names
        encoded = [os.fsencode(name) + b"\0" for name in names]
        both = [name + digest.encode() for name, digest in zip(encoded, digests, strict=True)]
        each = (_hash(name)[:_CHARS] + _hash(entry)[:_CHARS] for name, entry in zip(encoded, both, strict=True))
        self.value: dict[str, Any] = {
            "count": len(names),
            "names": _hash(b"".join(encoded))[:32],
            "all": _hash(b"\n".join(both))[:32],
            "each": "".join(part for part, _ in zip(each, range(NAMED_FILES), strict=False)),
        }

    def check(self, saved: dict[str, Any], left_out: Collection[str], folder: Path) -> None:
        """Raise a UserError if the files in `folder` are not those of a data position. Of the files `left_out`, only
        the names must be the same."""
        before, now = _split(saved["each"]), _split(self.value["each"])
        if saved["names"] == self.value["names"]:
            exempt = [name in left_out for name in self._names]
            same = all(a == b or skip for a, b, skip in zip(before, now, exempt, strict=False))
            if saved["all"] == self.value["all"] or (any(exempt) and same):
                return
            before = [b if skip else a for a, b, skip in zip(before, now, exempt, strict=False)]
        raise UserError(
            f"data: the files of {str(folder)!r} are not those that the run was started on ({saved['count']} then, "
            f"{self.value['count']} now; first difference: {self._difference(before, now, left_out)}, "
            "or pass --overwrite to start over"
        )

    def _difference(self, before: list[str], now: list[str], left_out: Collection[str]) -> str:
        put_back = "put it back, leave it out with --skip-data NAME"
        same = 0
        while same < min(len(before), len(now)) and before[same] == now[same]:
            same += 1
        if same == NAMED_FILES:
            return f"after the first {same}): pass the old data"
        if same == len(now):
            return f"one after {shown(self._names[-1])} is gone): {put_back}"
        name = shown(self._names[same])
        if same < len(before) and before[same][:_CHARS] == now[same][:_CHARS]:
            return f"{name} has another content): {put_back}"
        if len(before) > len(now) and before[same + 1] == now[same]:
            return f"one before {name} is gone): {put_back}"
        if len(before) < len(now) and (same == len(before) or before[same] == now[same + 1]):
            if self._names[same] in left_out:
                return f"--skip-data names {name}, which is not one of them): leave that out"
            return f"{name} is new): move it elsewhere"
        return f"{name} is new): pass the old data"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _split(each: str) -> list[str]:
    return [each[i : i + 2 * _CHARS] for i in range(0, len(each), 2 * _CHARS)]
