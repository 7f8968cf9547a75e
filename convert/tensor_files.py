"""Reading and writing tensor files one tensor at a time: safetensors, sharded or not, and PyTorch's own files."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from convert.pickled import check_pickled
from jaxllm.errors import UserError, listed, one_line, shown
from jaxllm.files import read_json, unique_keys, write_json

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 * 2**20
"""Largest index, or header of a file, that is read: one with a million tensors."""
MAX_SHARD_BYTES = 5_000_000_000

WRAPPERS = re.compile(
    r"^(module\.)+|(?<![^.])(_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.)+(module\.)?"
)
"""What torch.compile, DataParallel, FSDP and checkpointing put into the names of a model that they wrap."""

NESTED = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training scripts save a state_dict."""

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16"}
_FP8_DTYPES = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu)}
"""Which the `safetensors` package does not give as NumPy arrays."""


class Tensor(NamedTuple):
    """A tensor that can be read but has not been."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    dtype: str
    """In the words of the safetensors format; of one to be written, a key of DTYPES."""


def write_safetensors(folder: Path, tensors: Iterable[Tensor]) -> None:
    """Write `model.safetensors`, or shards with an index past 5 GB, holding one tensor in memory at a time.

    The `safetensors` package can only write from a dict of all tensors; the format is simple enough to stream: the
    header's length, the header as JSON, the tensors' bytes (https://huggingface.co/docs/safetensors).
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
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard)
    if len(shards) > 1:
        total = sum(_bytes(tensor) for shard in shards for tensor in shard)
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _bytes(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape)) * DTYPES[tensor.dtype].itemsize


def _write_file(path: Path, tensors: list[Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + _bytes(tensor)
        header[tensor.name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
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
            values = np.ascontiguousarray(tensor.read(), DTYPES[tensor.dtype])
            file.write(values.reshape(-1).view(np.uint8).data)


class TensorFiles:
    """The tensors of a folder or a file, by name; closed by `with`.

    Attributes:
        shapes: each name with its shape.
        dtypes: each name with its dtype, in the words of the safetensors format.
        duplicates: names that more than one file holds.
        misplaced: names that the index puts into a file that does not hold them.
        size: bytes of all files.
    """

    def __init__(self, path: Path):
        """
        Raises:
            UserError: there are no weights at `path`, or they cannot be read.
        """
        self._stack = ExitStack()
        self._readers: dict[str, Callable[[], np.ndarray]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.duplicates: list[str] = []
        self.misplaced: list[str] = []
        self.size = 0
        self._path = path
        try:
            wrapped = 0
            for file, expected in _weight_files(path).items():
                held = set()
                for tensor in self._open(file):
                    name = WRAPPERS.sub("", tensor.name)
                    wrapped += name != tensor.name
                    if name in self.shapes:
                        self.duplicates.append(name)
                    self.shapes[name], self.dtypes[name] = tensor.shape, tensor.dtype
                    self._readers[name] = tensor.read
                    held.add(tensor.name)
                self.misplaced += sorted(expected - held)
                self.size += file.stat().st_size
            if wrapped:
                print(f"{path}: {wrapped} names are read without what torch.compile or another wrapper put into them")
        except BaseException:
            self._stack.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """
        Raises:
            UserError: the tensor is of a kind that NumPy does not have, or its bytes are not there.
        """
        try:
            return self._readers[name]()
        except Exception as error:  # safetensors, PyTorch and NumPy raise kinds of their own
            raise UserError(f"{self._path}: {listed([name])} cannot be read ({one_line(error)})") from None

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *exc) -> None:
        self._stack.close()

    def _open(self, file: Path) -> Iterator[Tensor]:
        if file.suffix == ".safetensors":
            return self._open_safetensors(file)
        return self._open_torch(file)

    def _open_safetensors(self, file: Path) -> Iterator[Tensor]:
        header, start = _read_header(file)
        try:
            opened = self._stack.enter_context(safe_open(file, "numpy"))
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} is no complete safetensors file ({one_line(error)}): copy or export it again"
            ) from None
        for name in opened.keys():  # noqa: SIM118, it is no dict
            shape, dtype = tuple(header[name]["shape"]), header[name]["dtype"]
            if dtype in _FP8_DTYPES:
                place = {"offset": start + header[name]["data_offsets"][0], "shape": shape, "dtype": _FP8_DTYPES[dtype]}
                yield Tensor(name, shape, lambda place=place: np.memmap(file, mode="r", **place), dtype)
            else:
                yield Tensor(name, shape, lambda name=name: opened.get_tensor(name), dtype)

    def _open_torch(self, file: Path) -> Iterator[Tensor]:
        try:
            import torch
        except ImportError:
            raise UserError(
                f"{file} is a PyTorch file: reading it needs PyTorch: pip install 'jaxllm[torch]'"
            ) from None
        check_pickled(file)
        try:
            state = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
        except Exception as error:  # the unpickler raises whatever the bytes make it raise
            raise UserError(f"{file} is no file of PyTorch tensors that is safe to read ({one_line(error)})") from None
        while isinstance(state, dict) and (key := next((k for k in NESTED if isinstance(state.get(k), dict)), None)):
            print(f"{file}: the weights are read from its entry {key!r}")
            state = state[key]
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise UserError(f"{file} holds no state_dict: a dict of names and tensors is expected")
        for name, value in state.items():
            yield Tensor(str(name), tuple(value.shape), lambda value=value: _torch_to_numpy(value), str(value.dtype))


def _torch_to_numpy(value) -> np.ndarray:
    import torch

    value = value.detach()  # a trained parameter, where the dict is no state_dict() proper
    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def _read_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The header, and where the data begin. The `safetensors` package checks the rest, but lets pass what this refuses:
    a header of any size, and a tensor that has two places in it."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > MAX_INDEX_BYTES:
                raise _incomplete(file, f"its header claims {length} bytes")
            return json.loads(opened.read(length), object_pairs_hook=unique_keys), 8 + length
    except (OSError, ValueError, RecursionError) as error:
        raise _incomplete(file, one_line(error)) from None


def _incomplete(file: Path, reason: str) -> UserError:
    return UserError(f"{file} is no complete safetensors file ({reason}): copy or export it again")


def _weight_files(path: Path) -> dict[Path, set[str]]:
    """The files, each with the tensors that an index puts there. A file may be a symlink, as in the Hub's cache."""
    if path.is_file():
        if path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
            raise UserError(f"{path}: the ending must be one of .safetensors, .bin, .pt, .pth")
        return {path: set()}
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or folder")
    if (path / INDEX_NAME).is_file():
        return _indexed_files(path)
    for name in (WEIGHTS_NAME, "pytorch_model.bin"):
        if (path / name).is_file():
            return {path / name: set()}
    raise UserError(f"{path} holds no {WEIGHTS_NAME}, {INDEX_NAME} or pytorch_model.bin")


def _indexed_files(path: Path) -> dict[Path, set[str]]:
    weight_map = read_json(path / INDEX_NAME, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path / INDEX_NAME} has no weight_map")
    held = {file.name for file in path.iterdir() if file.is_file()}  # so that no name leads elsewhere
    files: dict[Path, set[str]] = {}
    for tensor, name in sorted(weight_map.items()):
        if not isinstance(name, str) or name not in held:
            raise UserError(f"{path / INDEX_NAME} names the file {shown(name)}, which the folder does not hold")
        if not name.endswith(".safetensors"):
            raise UserError(f"{path / INDEX_NAME} names the file {shown(name)}: the ending must be .safetensors")
        files.setdefault(path / name, set()).add(tensor)
    return files
