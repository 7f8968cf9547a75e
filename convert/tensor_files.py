"""Reading and writing tensor files one tensor at a time: safetensors, sharded or not, and PyTorch's own files."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from convert.fused import pieces
from convert.pickled import check_pickled
from convert.weight_files import INDEX_NAME, MAX_INDEX_BYTES, WEIGHTS_NAME, weight_files
from jaxllm.errors import UserError, listed, one_line
from jaxllm.files import unique_keys, write_json
from jaxllm.model.dtypes import check_floats

MAX_SHARD_BYTES = 5_000_000_000

WRAPPERS = re.compile(
    r"^(module\.)+|(?<![^.])(_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.)+(module\.)?"
)
"""What torch.compile, DataParallel, FSDP and checkpointing put into the names of a model that they wrap."""

NESTED = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training scripts save a state_dict."""

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
"""Those that are written."""

_SAFETENSORS_DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_SAFETENSORS_NAMES = {np.dtype(kind): name for name, kind in _SAFETENSORS_DTYPES.items()}


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

    Raises:
        UserError: a tensor does not hold finite floating-point numbers that its dtype can represent.
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
            "dtype": _SAFETENSORS_NAMES[DTYPES[tensor.dtype]],
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
    except UserError:
        path.unlink()
        raise


def _checked(tensor: Tensor) -> np.ndarray:
    """The values of a tensor to be written, in its dtype."""
    values = tensor.read()
    if values.shape != tensor.shape:
        raise UserError(f"{tensor.name} has the shape {list(values.shape)}: {list(tensor.shape)} is expected")
    check_floats(tensor.name, values)
    with np.errstate(over="ignore"):
        written = np.ascontiguousarray(values, DTYPES[tensor.dtype])
    if not np.isfinite(written).all():
        raise UserError(
            f"{tensor.name} has a value of {float(np.abs(values).max()):.3g}, which {tensor.dtype} cannot hold: pass "
            "the dtype bfloat16 or float32"
        )
    return written


class TensorFiles:
    """The tensors of a folder or a file, by name; closed by `with`.

    A folder may hold several sets of weight files. That which transformers reads is read; a line names the others.

    Attributes:
        shapes: each name with its shape.
        dtypes: each name with its dtype, in the words of the safetensors format.
        duplicates: names that more than one file holds.
        misplaced: names that the index puts into a file that does not hold them.
        unopened: names in shards that were not opened, as nothing in them is needed.
        size: bytes of all files.
    """

    def __init__(
        self,
        path: Path,
        needed: Callable[[str], bool] = lambda name: True,
        files: Mapping[Path, set[str]] | None = None,
    ):
        """
        Args:
            path: a folder, or a file.
            needed: which tensors will be read, by name: a shard that has none of them may be missing.
            files: those to read, each with the tensors that an index puts there; None: by the rules of `weight_files`.

        Raises:
            UserError: there are no weights at `path`, they cannot be read, or there are two sets of them that differ.
        """
        self._stack = ExitStack()
        self._readers: dict[str, Callable[[], np.ndarray]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.duplicates: list[str] = []
        self.misplaced: list[str] = []
        self.unopened: list[str] = []
        self.size = 0
        self._path = path
        rival = {}
        if files is None:
            files, self.unopened, rival = weight_files(path, lambda name: needed(WRAPPERS.sub("", name)))
        try:
            self._add(files)
            if rival:
                self._check_equal(rival)
        except BaseException:
            self._stack.close()
            raise

    def _add(self, files: Mapping[Path, set[str]]) -> None:
        wrapped = fused = 0
        for file, expected in files.items():
            held = set()
            for tensor in self._open(file):
                held.add(tensor.name)
                name = WRAPPERS.sub("", tensor.name)
                wrapped += name != tensor.name
                for piece in pieces(name, tensor.shape):
                    fused += piece.name != name
                    if piece.name in self.shapes:
                        self.duplicates.append(piece.name)
                    self.shapes[piece.name], self.dtypes[piece.name] = piece.shape, tensor.dtype
                    self._readers[piece.name] = lambda read=tensor.read, index=piece.index: read()[index]
            self.misplaced += sorted(expected - held)
            self.size += file.stat().st_size
        if wrapped:
            print(f"{self._path}: {wrapped} names are read without what torch.compile or another wrapper put into them")
        if fused:
            print(f"{self._path}: {fused} tensors of single experts are read from those that transformers 5 joins")

    def _check_equal(self, rival: Mapping[Path, set[str]]) -> None:
        """Refuse another set of weights that differs from this one."""
        with TensorFiles(self._path, files=rival) as other:
            differing = sorted(self.shapes.keys() ^ other.shapes.keys())
            if not differing:
                differing = [name for name in self.shapes if not self.equals(name, other, name)]
        if differing:
            raise UserError(
                f"{self._path} holds two sets of weights that differ, a single file, which transformers reads, and the "
                "shards of an index: move the set that is not meant out of the folder; they differ in "
                f"{listed(differing, most=3)}"
            )

    def read(self, name: str) -> np.ndarray:
        """
        Raises:
            UserError: the tensor is of a kind that NumPy does not have, or its bytes are not there.
        """
        try:
            return self._readers[name]()
        except Exception as error:  # PyTorch and NumPy raise kinds of their own
            raise UserError(f"{self._path}: {listed([name])} cannot be read ({one_line(error)})") from None

    def equals(self, name: str, other: TensorFiles, other_name: str) -> bool:
        """Whether a tensor has the shape, the dtype and the bits of one of other files."""
        if (self.shapes[name], self.dtypes[name]) != (other.shapes[other_name], other.dtypes[other_name]):
            return False
        one, two = (np.ascontiguousarray(x).view(np.uint8) for x in (self.read(name), other.read(other_name)))
        return np.array_equal(one, two)

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
            raise _incomplete(file, one_line(error)) from None
        for name in opened.keys():  # noqa: SIM118, it is no dict
            shape, dtype = tuple(header[name]["shape"]), header[name]["dtype"]
            place = {"offset": start + header[name]["data_offsets"][0], "shape": shape}

            # by NumPy: the package gives no FP8 arrays, and an expert is a slice of an array that is not read whole
            def read(place: dict[str, Any] = place, dtype: str = dtype) -> np.ndarray:
                return np.memmap(file, _SAFETENSORS_DTYPES[dtype], "r", **place)

            yield Tensor(name, shape, read, dtype)

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
            raise UserError(
                f"{file} is not a file of PyTorch tensors that is safe to read ({one_line(error)})"
            ) from None
        while isinstance(state, dict) and (key := next((k for k in NESTED if isinstance(state.get(k), dict)), None)):
            print(f"{file}: the weights are read from its entry {key!r}")
            state = state[key]
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise UserError(f"{file} holds no state_dict: a dict of names and tensors is expected")
        for name, value in state.items():
            yield Tensor(str(name), tuple(value.shape), lambda value=value: _torch_to_numpy(value), _torch_dtype(value))


def _torch_dtype(value) -> str:
    """In the words of the safetensors format where it has one."""
    name = str(value.dtype).removeprefix("torch.")
    try:
        return _SAFETENSORS_NAMES.get(np.dtype(name), name)
    except TypeError:  # a quantized one
        return name


def _torch_to_numpy(value) -> np.ndarray:
    import torch

    value = value.detach()  # a trained parameter, where the dict is no state_dict() proper
    kind = _SAFETENSORS_DTYPES.get(_torch_dtype(value))
    if kind is not None and np.dtype(kind).kind == "V":  # NumPy has it from ml_dtypes, unknown to PyTorch
        bits = torch.uint16 if np.dtype(kind).itemsize == 2 else torch.uint8
        return value.contiguous().view(bits).numpy().view(kind)
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
    return UserError(f"{file} is not a complete safetensors file ({reason}): copy or export it again")
