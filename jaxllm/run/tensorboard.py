"""TensorBoard events of a run: scalars, each written to the file at once.

An event is a protocol buffer (tensorflow/core/util/event.proto) in a TFRecord: length, checksum, bytes, checksum.
Libraries write them from a thread of their own, which a full disk ends without a word.
"""

import ctypes
import math
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

from jaxllm.errors import one_line, optional
from jaxllm.files import StrPath


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a record by their names in a tracker: `train/`, `eval/`, or `end/` for the last line.

    The last line holds means of the whole run: among the training lines they would look like a spike.
    """
    closing, found = "train_runtime" in record, {}
    for name, value in record.items():
        if name not in ("step", "epoch") and isinstance(value, int | float) and math.isfinite(value):
            group, _, rest = name.partition("_")
            rest = rest if group in ("eval", "train") else name
            found[f"{'end' if closing else 'eval' if group == 'eval' else 'train'}/{rest}"] = value
    return found


class TensorBoardWriter:
    """Writes the numbers of each record, as long as the disk takes them."""

    def __init__(self, folder: StrPath, first_step: int):
        """`first_step`: events of later steps, from a process that was killed, are hidden."""
        self._file = None
        with optional(f"writing {folder}"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
            self._file = Path(folder, name).open("ab", buffering=0)  # noqa: SIM115
            self._write(_field(3, b"brain.Event:2"))  # file_version
            self._write(_field(2, first_step + 1), _field(7, _field(1, 1)))  # step, session_log: status START

    def write(self, record: dict[str, Any]) -> None:
        """Write a record, unless an earlier one could not be written."""
        values = (_field(1, name.encode()) + _field(2, float(value)) for name, value in scalars(record).items())
        self._write(_field(2, record["step"]), _field(5, b"".join(_field(1, value) for value in values)))  # summary

    def _write(self, *fields: bytes) -> None:
        if self._file is None:
            return
        event = struct.pack("<Bd", 1 << 3 | 1, time.time()) + b"".join(fields)  # wall_time
        length = struct.pack("<Q", len(event))
        try:
            self._file.write(length + _checksum(length) + event + _checksum(event))
        except OSError as error:
            print(f"warning: TensorBoard's events are no longer written ({one_line(error)})", file=sys.stderr)
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def _field(number: int, value: int | float | bytes) -> bytes:
    """A field of a protocol buffer: a float32, a non-negative integer, or bytes."""
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + bytes(ctypes.c_float(value))  # inf beyond the range of float32
    if isinstance(value, int):
        return bytes([number << 3]) + _varint(value)
    return bytes([number << 3 | 2]) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 128:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def _crc32c_table() -> list[int]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_TABLE = _crc32c_table()


def _checksum(data: bytes) -> bytes:
    """The masked CRC-32C of a TFRecord."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
