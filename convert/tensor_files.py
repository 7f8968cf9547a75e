"""Reading and writing tensor files one tensor at a time: safetensors, sharded or not, and PyTorch's own files."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxllm.config import read_json, write_json
from jaxllm.errors import UserError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16"}


class Tensor(NamedTuple):
    """A tensor that can be read but has not been."""

    name: str
    shape: tuple[int, ...]
    read: object  # () -> np.ndarray


def write_safetensors(folder: Path, tensors: Iterable[Tensor], dtype: str) -> None:
    """Write `model.safetensors`, or shards with an index past 5 GB, holding one tensor in memory at a time.

    The `safetensors` package can only write from a dict of all tensors; the format is simple enough to stream: the
    header's length, the header as JSON, the tensors' bytes (https://huggingface.co/docs/safetensors).
    """
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = _bytes(tensor, dtype)
        if shards[-1] and filled + size > MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    names = [WEIGHTS_NAME]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, dtype)
    if len(shards) > 1:
        total = sum(_bytes(tensor, dtype) for shard in shards for tensor in shard)
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _bytes(tensor: Tensor, dtype: str) -> int:
    return int(np.prod(tensor.shape)) * DTYPES[dtype].itemsize


def _write_file(path: Path, tensors: list[Tensor], dtype: str) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + _bytes(tensor, dtype)
        header[tensor.name] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for tensor in tensors:
            values = np.ascontiguousarray(tensor.read(), DTYPES[dtype])
            file.write(values.reshape(-1).view(np.uint8).data)


class TensorFiles:
    """The tensors of a folder or a file, by name; closed by `with`.

    Attributes:
        shapes: each name with its shape.
        duplicates: names that more than one file holds.
    """

    def __init__(self, path: Path):
        """
        Raises:
            UserError: there are no weights at `path`, or they cannot be read.
        """
        self._stack = ExitStack()
        self._readers: dict[str, object] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.duplicates: list[str] = []
        try:
            for file in _weight_files(path):
                for tensor in self._open(file):
                    if tensor.name in self.shapes:
                        self.duplicates.append(tensor.name)
                    self.shapes[tensor.name] = tensor.shape
                    self._readers[tensor.name] = tensor.read
        except BaseException:
            self._stack.close()
            raise

    def read(self, name: str) -> np.ndarray:
        return self._readers[name]()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *exc) -> None:
        self._stack.close()

    def _open(self, file: Path) -> Iterator[Tensor]:
        if file.suffix == ".safetensors":
            return self._open_safetensors(file)
        return self._open_torch(file)

    def _open_safetensors(self, file: Path) -> Iterator[Tensor]:
        try:
            opened = self._stack.enter_context(safe_open(file, "numpy"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is no complete safetensors file ({error}): copy or export it again") from None
        for name in opened.keys():  # noqa: SIM118, it is no dict
            yield Tensor(name, tuple(opened.get_slice(name).get_shape()), lambda name=name: opened.get_tensor(name))

    def _open_torch(self, file: Path) -> Iterator[Tensor]:
        try:
            import torch
        except ImportError:
            raise UserError(
                f"{file} is a PyTorch file: reading it needs PyTorch: pip install 'jaxllm[torch]'"
            ) from None
        try:
            state = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
        except Exception as error:  # the unpickler raises whatever the bytes make it raise
            reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
            raise UserError(f"{file} is no file of PyTorch tensors that is safe to read ({reason})") from None
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise UserError(f"{file} holds no state_dict: a dict of names and tensors is expected")
        for name, value in state.items():
            yield Tensor(str(name), tuple(value.shape), lambda value=value: _torch_to_numpy(value))


def _torch_to_numpy(value) -> np.ndarray:
    import torch

    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
            raise UserError(f"{path}: the ending must be one of .safetensors, .bin, .pt, .pth")
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or folder")
    if (path / INDEX_NAME).is_file():
        weight_map = read_json(path / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{path / INDEX_NAME} has no weight_map")
        names = sorted(set(map(str, weight_map.values())))
        for name in names:
            if Path(name).name != name or not (path / name).is_file():
                raise UserError(f"{path / INDEX_NAME} names the file {name!r}, which the folder does not hold")
        return [path / name for name in names]
    for name in (WEIGHTS_NAME, "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name]
    raise UserError(f"{path} holds no {WEIGHTS_NAME}, {INDEX_NAME} or pytorch_model.bin")
