"""Reading weights into the Flax leaves that hold them: a process reads what its devices hold, and nothing twice."""

import collections
import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from convert import fp8
from convert.mapping import Box, Entry, Held, Part, copy_into, leaf
from convert.tensor_files import SAFETENSORS_DTYPES, TensorFiles
from jaxllm.errors import UserError
from jaxllm.model.dtypes import Pytree
from jaxllm.model.inference import Hold

MAX_IN_FLIGHT = 2**25
"""Values that threads read at the same time, beyond the first tensor: in float32 they take 128 MiB."""

MAX_THREADS = 8

ALIGNMENT = 64
"""Of a host buffer in bytes: a CPU device takes one that is aligned as it is, without a copy."""

Key = tuple[str, tuple[str, ...]]
"""A leaf: its tree, and its path there."""


class _Leaf:
    """The parts of a Flax leaf that this process holds, each once in host memory while it is filled."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding | None):
        self._shape, self._dtype, self._sharding = shape, dtype, sharding
        places: Mapping[Any, Any] = {None: (slice(None),) * len(shape)}
        if sharding is not None:
            places = sharding.addressable_devices_indices_map(shape)
        self._boxes: dict[Any, Box] = {
            device: tuple(range(*along.indices(size)) for along, size in zip(index, shape, strict=True))
            for device, index in places.items()
        }
        self._buffers: dict[Box, np.ndarray] = {}

    @property
    def share(self) -> float:
        """How much of the leaf is held."""
        return sum(math.prod(map(len, box)) for box in {*self._boxes.values()}) / math.prod(self._shape)

    def start(self) -> None:
        """Take memory: of zeros, which takes none before it is written to."""
        self._buffers = {
            box: _aligned_zeros([len(along) for along in box], self._dtype) for box in self._boxes.values()
        }

    def targets(self, entry: Entry, part: Part) -> Iterator[tuple[np.ndarray, Held]]:
        """Where values of a tensor belong, and which those are."""
        for box, buffer in self._buffers.items():
            if (held := entry.held_by(part, box)) is not None:
                yield buffer[held.index], held

    def place(self) -> Any:
        """The filled leaf on its devices, or on the host. The host memory is free, unless a CPU device keeps it."""
        buffers, self._buffers = self._buffers, {}
        if self._sharding is None:
            return buffers[self._boxes[None]]
        parts = [jax.device_put(buffers[box], device) for device, box in self._boxes.items()]
        return jax.block_until_ready(
            jax.make_array_from_single_device_arrays(self._shape, self._sharding, parts, dtype=self._dtype)
        )


def read_leaves(
    files: TensorFiles, table: Mapping[str, Entry], trees: Pytree, facts: Pytree, hold: Hold, place: Pytree
) -> Pytree:
    """Fill the leaves of Flax trees with a file's tensors, those first that need one another's.

    Host memory holds the leaves that are being filled and one tensor, or some small ones; leaves of CPU devices stay
    there.

    Args:
        table: the entries by the names of their tensors. What the files lack is zero.
        trees: the shapes of all leaves.
        facts: of each leaf.
        hold: the dtype of each leaf, given its facts and the stored dtype of its tensors (`_stored`).
        place: the sharding of each leaf, or None: on the host, as a NumPy array.

    Raises:
        UserError: a tensor is not of floating-point numbers, has values that are not finite, or cannot be read.
    """
    groups: dict[tuple[Key, ...], list[Entry]] = collections.defaultdict(list)
    for entry in table.values():
        groups[tuple(dict.fromkeys((part.tree, part.path) for part in entry.parts))].append(entry)
    leaves: dict[Key, _Leaf] = {}
    for keys, members in groups.items():
        dtypes = [_stored(files.dtypes[entry.torch_name]) for entry in members if entry.torch_name in files.shapes]
        stored = jnp.result_type(*dtypes) if dtypes else np.dtype(np.float32)
        for key in keys:
            shape, known, where = (leaf(tree[key[0]], key[1]) for tree in (trees, facts, place))
            leaves[key] = _Leaf(shape.shape, np.dtype(hold(known, stored)), where)
    made: dict[Key, Any] = {}
    with contextlib.ExitStack() as stack:
        total = sum(
            round(_bytes(files, entry) * leaves[keys[0]].share) for keys, members in groups.items() for entry in members
        )
        bar = tqdm(total=total, desc="Reading", unit="B", unit_scale=True, dynamic_ncols=True, disable=None)
        stack.enter_context(bar)
        pool = stack.enter_context(ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)))
        for keys, members in groups.items():
            for key in keys:
                leaves[key].start()
            _fill(files, members, leaves, pool, bar)
            made |= {key: leaves.pop(key).place() for key in keys}
    return jax.tree_util.tree_map_with_path(lambda path, _: made[path[0].key, tuple(k.key for k in path[1:])], trees)


def _fill(files: TensorFiles, members: list[Entry], leaves: Mapping[Key, _Leaf], pool: ThreadPoolExecutor, bar: tqdm):
    waiting: collections.deque[tuple[int, Future[int]]] = collections.deque()
    in_flight = 0
    try:
        for entry in members:
            if entry.torch_name not in files.shapes:
                continue
            size = math.prod(files.shapes[entry.torch_name])
            while waiting and in_flight + size > MAX_IN_FLIGHT:
                in_flight -= waiting[0][0]
                bar.update(waiting.popleft()[1].result())
            waiting.append((size, pool.submit(_read_entry, files, entry, leaves)))
            in_flight += size
        while waiting:
            bar.update(waiting.popleft()[1].result())
    finally:
        for _, future in waiting:
            future.cancel()


def _read_entry(files: TensorFiles, entry: Entry, leaves: Mapping[Key, _Leaf]) -> int:
    """Put what is held of one tensor into its places; returns the bytes that were read."""
    name = entry.torch_name
    targets = [target for part in entry.parts for target in leaves[part.tree, part.path].targets(entry, part)]
    if not targets:
        return 0
    spans = zip(*(held.span for _, held in targets), strict=True)
    box = tuple(range(min(r.start for r in axis), max(r.stop for r in axis)) for axis in spans)
    tensor = files.read(name, box)
    count = tensor.nbytes
    if files.dtypes[name] == fp8.FP8:
        tensor = fp8.dequantize(tensor, files.read(name + fp8.SCALE_SUFFIX), (box[0].start, box[1].start))
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise UserError(f"{files.path}: {name} has the dtype {tensor.dtype}: floating point is expected")
    if not np.isfinite(tensor).all():
        raise UserError(f"{files.path}: {name} has values that are not finite: name weights from before they diverged")
    for target, held in targets:
        values = tensor[held.within(box)]
        copy_into(target, values.T if entry.transposed else values)
    return count


def _stored(dtype: str) -> np.dtype:
    """The dtype of 16 or 32 bits that has all values of a file's dtype. Float64 is rounded to float32, and FP8 with its
    scales to bfloat16."""
    exact = np.dtype(SAFETENSORS_DTYPES[dtype] if dtype in ("BF16", "F16") else np.float32)
    return fp8.HELD if dtype == fp8.FP8 else exact


def _bytes(files: TensorFiles, entry: Entry) -> int:
    name = entry.torch_name
    if name not in files.shapes or files.dtypes[name] not in SAFETENSORS_DTYPES:
        return 0
    return math.prod(files.shapes[name]) * np.dtype(SAFETENSORS_DTYPES[files.dtypes[name]]).itemsize


def _aligned_zeros(shape: list[int], dtype: Any) -> np.ndarray:
    count = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(count + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count].view(dtype).reshape(shape)
