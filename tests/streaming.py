"""Folders of weights that are too large to make whole, and what reading one of them takes, in a process of its own.

python -m tests.streaming FOLDER [MESH [PROCESS PROCESSES PORT]]
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.fp8 import SCALE_SUFFIX, scale_shape
from convert.mapping import PARAMS, ROUTING_BIAS, entries
from jaxllm.config.families import read_config
from jaxllm.files import write_json
from jaxllm.model.decoder import abstract_model

KINDS = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}


def values_of(name: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values that follow from the name; small bits, so that all are finite."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    if kind == "F8_E4M3":
        return rng.integers(0, 0x78, shape, np.uint8).view(KINDS[kind])
    if kind == "BF16":
        return rng.integers(0x3000, 0x4000, shape, np.uint16).view(KINDS[kind])
    return rng.random(shape, np.float32)


def make_folder(folder: Path, source: dict[str, Any], shards: int, fp8: bool = False, mtp: int = 0) -> Path:
    """A folder of bfloat16 weights, its linears FP8 if asked for, in several files; `mtp` layers beyond its own."""
    folder.mkdir(parents=True)
    if fp8:
        source = source | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    write_json(folder / "config.json", source | ({"num_nextn_predict_layers": mtp} if mtp else {}))
    config = read_config(source)
    trees = dict(zip((PARAMS, ROUTING_BIAS), abstract_model(config)[1:], strict=True))
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    last = f"model.layers.{config.num_hidden_layers - 1}."
    for entry in entries(config):
        names = [entry.torch_name]
        if entry.torch_name.startswith(last):
            names += [
                f"model.layers.{config.num_hidden_layers + i}.{entry.torch_name.removeprefix(last)}" for i in range(mtp)
            ]
        for name in names:
            shape = entry.shape(trees)
            linear = fp8 and ".layers." in name and len(shape) == 2 and ".gate." not in name
            tensors.append((name, "F32" if entry.float32 else "F8_E4M3" if linear else "BF16", shape))
            if linear:
                tensors.append((name + SCALE_SUFFIX, "F32", scale_shape(shape)))
    each, weight_map = -(-len(tensors) // shards), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part, header, offset = tensors[shard * each : (shard + 1) * each], {}, 0
        for name, kind, shape in part:
            end = offset + math.prod(shape) * np.dtype(KINDS[kind]).itemsize
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
            offset, weight_map[name] = end, file
        encoded = json.dumps(header).encode()
        with (folder / file).open("wb") as opened:
            opened.write(len(encoded).to_bytes(8, "little") + encoded)
            for name, kind, shape in part:
                opened.write(values_of(name, kind, shape).tobytes())
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return folder


def digest(leaf: Any) -> str:
    """Of the bits of an array that this process has whole, part by part."""
    return hashlib.sha256(np.ascontiguousarray(leaf).view(np.uint8).data).hexdigest()


def digests(leaf: Any) -> list[tuple[list[tuple[int, ...]], str]]:
    """Of each part of an array that this process holds, with its place."""
    places = (
        [part.indices(size)[:2] for part, size in zip(shard.index, leaf.shape, strict=True)]
        for shard in leaf.addressable_shards
    )
    return [(place, digest(shard.data)) for place, shard in zip(places, leaf.addressable_shards, strict=True)]


def main(folder: str, mesh: str = "", *distributed: str) -> None:
    import jax

    if distributed:
        process, processes, port = map(int, distributed)
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    from convert.to_flax import read_model
    from jaxllm.config import TrainConfig
    from jaxllm.model.inference import as_stored
    from jaxllm.store.folder import read_model_config
    from jaxllm.train.placement import choose_placement

    model = read_model_config(folder)
    options = {"init": folder, "model": model, "seq_len": 16, "batch_size": 8, **({"mesh": mesh} if mesh else {})}
    config = TrainConfig.from_options(**options)
    place = choose_placement(config.mesh, config.data.batch_size).weight_shardings(config.model)
    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    before = taken()
    _, weights, *_ = read_model(folder, hold=as_stored, place=place)
    after = taken()
    leaves = jax.tree_util.tree_leaves_with_path(tuple(weights))
    share = sum(shard.data.nbytes for _, leaf in leaves for shard in leaf.addressable_shards)
    found = {jax.tree_util.keystr(path): digests(leaf) for path, leaf in leaves}
    print(
        json.dumps(
            {"share": share, "read": after[1] - before[1], "peak": after[0], "before": before[0], "found": found}
        )
    )


def taken() -> tuple[int, int]:
    """The peak of resident memory, and the bytes that were read from files."""
    status, io = Path("/proc/self/status").read_text(), Path("/proc/self/io").read_text()
    lines = dict(line.split(":", 1) for line in (*status.splitlines(), *io.splitlines()))
    return int(lines["VmHWM"].split()[0]) * 1024, int(lines["rchar"])


if __name__ == "__main__":
    main(*sys.argv[1:])
