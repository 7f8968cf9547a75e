"""Reading tensor files, any part of a tensor at a time: safetensors, sharded or not, and PyTorch's own files."""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from convert.fused import pieces
from convert.mapping import Box
from convert.pickled import check_pickled
from convert.weight_files import MAX_INDEX_BYTES, weight_files
from jaxllm.errors import UserError, as_user_error, listed, note, one_line
from jaxllm.files import unique_keys

WRAPPERS = re.compile(
    r"^(module\.)+|(?<![^.])(_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.)+(module\.)?"
)
"""What torch.compile, DataParallel, FSDP and checkpointing put into the names of a model that they wrap."""

NESTED = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training scripts save a state_dict."""

SAFETENSORS_DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
SAFETENSORS_NAMES = {np.dtype(kind): name for name, kind in SAFETENSORS_DTYPES.items()}


class Stored(NamedTuple):
    """A tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As the safetensors format names it."""
    read: Callable[[Box], np.ndarray]


class TensorFiles:
    """The tensors of a folder or a file, by name; closed by `with`.

    A folder may hold several sets of weight files. The one that transformers reads is read; a message names the others.

    Attributes:
        path: the folder, or the file.
        shapes: each name with its shape.
        dtypes: each name with its dtype, as the safetensors format names it.
        duplicates: names that more than one file holds.
        misplaced: names that the index puts into a file that does not hold them.
        unopened: names in shards that are not opened, since nothing in them is needed.
        absent: names in shards that are missing.
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
        self.path = path
        self._stack = ExitStack()
        self._readers: dict[str, Callable[[Box], np.ndarray]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.duplicates: list[str] = []
        self.misplaced: list[str] = []
        self.unopened: list[str] = []
        self.absent: list[str] = []
        self.size = 0
        rival = {}
        if files is None:
            found = weight_files(path, lambda name: needed(WRAPPERS.sub("", name)))
            files, self.unopened, self.absent, rival, notes = found
            for line in notes:
                note(line)
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
                    self._readers[piece.name] = lambda box, read=tensor.read, piece=piece: read(piece.box(box))
            self.misplaced += sorted(expected - held)
            self.size += file.stat().st_size
        if wrapped:
            print(f"{self.path}: {wrapped} names are read without what torch.compile or another wrapper added")
        if fused:
            print(f"{self.path}: {fused} tensors of single experts are read from the joined ones of transformers 5")

    def _check_equal(self, rival: Mapping[Path, set[str]]) -> None:
        """Refuse another set of weights that differs from this one."""
        with TensorFiles(self.path, files=rival) as other:
            differing = sorted(self.shapes.keys() ^ other.shapes.keys())
            if not differing:
                differing = [name for name in self.shapes if not self.equals(name, other, name)]
        if differing:
            raise UserError(
                f"{self.path} holds two sets of weights that differ, a single file, which transformers reads, and the "
                "shards of an index: move the wrong one out of the folder; they differ in "
                f"{listed(differing, most=3)}"
            )

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """A box of a tensor; None: all of it. Only its bytes are read. Threads may read at the same time.

        Raises:
            UserError: the tensor is of a kind that NumPy does not have, or its bytes are not there.
        """
        box = tuple(map(range, self.shapes[name])) if box is None else box
        with as_user_error(lambda error: f"{self.path}: {listed([name])} cannot be read ({one_line(error)})"):
            return self._readers[name](box).reshape([len(held) for held in box])

    def misfits(
        self, wanted: Mapping[str, tuple[int, ...]], optional: Collection[str] = (), ignored: Collection[str] = ()
    ) -> str:
        """How the tensors that are not `ignored` differ from the `wanted` shapes, by kind; empty: they fit."""
        found = {name: shape for name, shape in self.shapes.items() if name not in ignored}
        kinds = {
            "unknown": sorted(found.keys() - wanted.keys()),
            "missing": sorted(wanted.keys() - found.keys() - {*optional}),
            "duplicate": sorted({*self.duplicates}),
            "not in the file that the index names": sorted({*self.misplaced}),
            "of another shape": [
                f"{name} {list(found[name])} instead of {list(shape)}"
                for name, shape in wanted.items()
                if found.get(name, shape) != shape
            ],
        }
        return "; ".join(f"{kind}: {listed(names)}" for kind, names in kinds.items() if names)

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

    def _open(self, file: Path) -> Iterator[Stored]:
        if file.suffix == ".safetensors":
            return self._open_safetensors(file)
        return self._open_torch(file)

    def _open_safetensors(self, file: Path) -> Iterator[Stored]:
        header, start = _read_header(file)
        try:
            with safe_open(file, "numpy") as checked:  # only checked: it returns no FP8 arrays, and maps the whole file
                names = list(checked.keys())
        except (SafetensorError, OSError) as error:
            raise _incomplete(file, one_line(error)) from None
        opened, lock = self._stack.enter_context(file.open("rb", buffering=0)), threading.Lock()
        for name in names:
            shape, dtype = tuple(header[name]["shape"]), header[name]["dtype"]
            offset = start + header[name]["data_offsets"][0]

            def read(box: Box, offset: int = offset, shape: tuple[int, ...] = shape, dtype: str = dtype) -> np.ndarray:
                values = np.empty([len(held) for held in box], SAFETENSORS_DTYPES[dtype])
                with lock:
                    for place, view in _runs(values, shape, box):
                        read_into(opened, offset + place, view)
                return values

            yield Stored(name, shape, dtype, read)

    def _open_torch(self, file: Path) -> Iterator[Stored]:
        try:
            import torch
        except ImportError:
            raise UserError(
                f"{file} is a PyTorch file: reading it needs PyTorch: pip install 'jaxllm[torch]'"
            ) from None
        check_pickled(file)
        unsafe = f"{file} is not a file of PyTorch tensors that is safe to read"
        with as_user_error(lambda error: f"{unsafe} ({one_line(error)})"):
            state = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
        while isinstance(state, dict) and (key := next((k for k in NESTED if isinstance(state.get(k), dict)), None)):
            print(f"{file}: the weights are read from its entry {key!r}")
            state = state[key]
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise UserError(f"{file} holds no state_dict: a dict of names and tensors is expected")
        for name, value in state.items():

            def read(box: Box, value: Any = value) -> np.ndarray:
                return _torch_to_numpy(value)[tuple(slice(held.start, held.stop) for held in box)]

            yield Stored(str(name), tuple(value.shape), _torch_dtype(value), read)


def read_into(file: IO[bytes], offset: int, view: memoryview) -> None:
    """Fill a buffer with the bytes of a file from an offset on. Raises an EOFError if the file ends before."""
    file.seek(offset)
    while view.nbytes:
        count = file.readinto(view)  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise EOFError(f"{file.name} ends before its last tensor")
        view = view[count:]


def _runs(values: np.ndarray, shape: tuple[int, ...], box: Box) -> Iterator[tuple[int, memoryview]]:
    """The ranges of bytes of a file that hold a box of a tensor of this shape: the offset of each, and its place in
    `values`. Axes that are read whole make longer ranges."""
    view, size = values.reshape(-1).view(np.uint8).data, values.itemsize
    cut = max((axis for axis, held in enumerate(box) if len(held) < shape[axis]), default=-1)
    length = size * math.prod(len(held) for held in box[max(cut, 0) :])
    row, first = size * math.prod(shape[cut + 1 :]), box[cut].start if cut >= 0 else 0
    if not length:
        return
    for number, lead in enumerate(itertools.product(*box[: max(cut, 0)])):
        at = 0
        for i, extent in zip((*lead, first), shape, strict=False):
            at = at * extent + i
        yield at * row, view[number * length : (number + 1) * length]


def _torch_dtype(value) -> str:
    """The dtype's name in the safetensors format, if it has one."""
    name = str(value.dtype).removeprefix("torch.")
    try:
        return SAFETENSORS_NAMES.get(np.dtype(name), name)
    except TypeError:  # a quantized one
        return name


def _torch_to_numpy(value) -> np.ndarray:
    import torch

    value = value.detach()  # a trained parameter, where the dict is no state_dict() proper
    kind = SAFETENSORS_DTYPES.get(_torch_dtype(value))
    if kind is not None and np.dtype(kind).kind == "V":  # NumPy has it from ml_dtypes, unknown to PyTorch
        bits = torch.uint16 if np.dtype(kind).itemsize == 2 else torch.uint8
        return value.contiguous().view(bits).numpy().view(kind)
    return value.numpy()


def _read_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The header, and where the data begin. The `safetensors` package checks the rest, but accepts two things that are
    refused here: a header of any size, and a tensor that is listed twice."""
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
