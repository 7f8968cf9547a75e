"""What `torch.load` must not meet in a file from elsewhere, looked for before it reads.

With `weights_only` it runs no code, but it does make what the pickle asks for: a `bytearray` of a terabyte, or a record
that a few compressed bytes blow up to one. A state_dict needs neither.
"""

import pickletools
import zipfile
from pathlib import Path
from typing import IO

from jaxllm.errors import UserError, as_user_error, listed

MAX_PICKLE_BYTES = 256 * 2**20
"""Largest pickle, which holds the tensors' names, shapes and offsets."""

LEGACY_PICKLES = 5
"""A file from before PyTorch 1.6 starts with: magic number, protocol, system, the object, keys of its storages."""

NEEDED = {"collections", "torch", "torch._utils", "torch.nn.parameter", "torch.storage", "torch._tensor"}
"""The modules of what a state_dict names."""


def check_pickled(file: Path) -> None:
    """Raise a UserError for a file of PyTorch's that cannot be read, names more than tensors need, or holds compressed
    records."""
    unsafe = f"{file} is not a file of PyTorch tensors that is safe to read"
    with as_user_error(lambda error: f"{unsafe} ({type(error).__name__})"):
        if zipfile.is_zipfile(file):
            foreign = _of_archive(file)
        else:
            with file.open("rb") as opened:
                foreign = set().union(*(_foreign(opened) for _ in range(LEGACY_PICKLES)))
    if foreign:
        raise UserError(f"{unsafe}: it names {listed(sorted(foreign))}")


def _of_archive(file: Path) -> set[str]:
    with zipfile.ZipFile(file) as archive:
        foreign = set()
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise _unsafe(file, "a record is compressed")
            if record.filename.endswith(".pkl"):
                if record.file_size > MAX_PICKLE_BYTES:
                    raise _unsafe(file, f"its pickle of {record.file_size} bytes has more than {MAX_PICKLE_BYTES}")
                with archive.open(record) as opened:
                    foreign |= _foreign(opened)
    return foreign


def _foreign(opened: IO[bytes]) -> set[str]:
    """Names that the next pickle takes from modules that tensors do not need."""
    found = set()
    for opcode, argument, _ in pickletools.genops(opened):
        if opcode.name in ("GLOBAL", "INST") and isinstance(argument, str):
            module, _, name = argument.partition(" ")
            if module not in NEEDED:
                found.add(f"{module}.{name}")
        elif opcode.name == "STACK_GLOBAL":  # names on the stack; PyTorch writes protocol 2, which has none
            found.add("a name that is put together")
    return found


def _unsafe(file: Path, reason: str) -> UserError:
    return UserError(
        f"{file} is not a file of PyTorch tensors that is safe to read ({reason}): export it as safetensors"
    )
