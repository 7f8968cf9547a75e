"""Writing tensor files: safetensors, one tensor in memory at a time."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from convert.mapping import copy_into
from convert.tensor_files import SAFETENSORS_DTYPES, SAFETENSORS_NAMES
from convert.weight_files import INDEX_NAME, WEIGHTS_NAME
from jaxllm.errors import UserError
from jaxllm.files import write_json
from jaxllm.model.dtypes import check_floats

MAX_SHARD_BYTES = 5_000_000_000

DTYPES = {
    name: np.dtype(SAFETENSORS_DTYPES[own])
    for name, own in (("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16"))
}
"""Those that are written."""


class Tensor(NamedTuple):
    """A tensor to be written, that is made when it is."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    dtype: str
    """A key of DTYPES."""


def write_safetensors(folder: Path, tensors: Iterable[Tensor]) -> None:
    """Write `model.safetensors`, or shards with an index past 5 GB, holding one tensor in memory at a time.

    The `safetensors` package can only write from a dict of all tensors; the format is simple enough to stream: the
    header's length, the header as JSON, the tensors' bytes (https://huggingface.co/docs/safetensors).

    Raises:
        UserError: a tensor does not hold finite floating-point numbers that its dtype can represent, or the disk has no
            room for all.
    """
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = _bytes(tensor)
        if shards[-1] and filled + size > MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    names = [WEIGHTS_NAME]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    total, free = sum(_bytes(tensor) for shard in shards for tensor in shard), shutil.disk_usage(folder).free
    if total > free:
        raise UserError(
            f"{folder}: the weights take {total / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there: free space or "
            "pass another folder"
        )
    with tqdm(total=total, desc="Writing", unit="B", unit_scale=True, dynamic_ncols=True, disable=None) as bar:
        for name, shard in zip(names, shards, strict=True):
            _write_file(folder / name, shard, bar)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _bytes(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape)) * DTYPES[tensor.dtype].itemsize


def _write_file(path: Path, tensors: list[Tensor], bar: tqdm) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + _bytes(tensor)
        header[tensor.name] = {
            "dtype": SAFETENSORS_NAMES[DTYPES[tensor.dtype]],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data
    try:
        with path.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little"))
            file.write(encoded)
            for tensor in tensors:
                file.write(_checked(tensor).reshape(-1).view(np.uint8).data)
                bar.update(_bytes(tensor))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    except UserError:
        path.unlink()
        raise


def _checked(tensor: Tensor) -> np.ndarray:
    """The values of a tensor to be written, in its dtype."""
    values = tensor.read()
    if values.shape != tensor.shape:
        raise UserError(f"{tensor.name} has the shape {list(values.shape)}: {list(tensor.shape)} is expected")
    check_floats(tensor.name, values)
    written = np.empty(tensor.shape, DTYPES[tensor.dtype])
    with np.errstate(over="ignore"):
        copy_into(written, values)
    if not np.isfinite(written).all():
        raise UserError(
            f"{tensor.name} has a value of {float(np.abs(values).max()):.3g}, which {tensor.dtype} cannot hold: pass "
            "the dtype bfloat16 or float32"
        )
    return written
