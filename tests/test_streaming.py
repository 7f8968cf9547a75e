"""Real folders are large: each process reads what its devices hold, no byte twice, and keeps no copy of the whole."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from convert import fp8, reader, tensor_files, write_files
from convert.__main__ import main as convert
from convert.mapping import PARAMS, ROUTING_BIAS, entries
from convert.tensor_files import TensorFiles
from convert.to_flax import read_folder, read_model
from convert.weight_files import weight_files
from jaxllm import UserError, from_pretrained
from jaxllm import generate as generation
from jaxllm.config import TrainConfig
from jaxllm.files import read_json, write_json
from jaxllm.model.decoder import abstract_model, model_facts
from jaxllm.model.inference import as_stored, is_narrow
from jaxllm.store.checkpoint import Weights, load_weights
from jaxllm.store.folder import read_model_config
from jaxllm.train.placement import choose_placement
from tests.streaming import digest, make_folder
from tests.test_families import V3, assert_same_bits

SMALL = V3 | {
    "hidden_size": 256, "moe_intermediate_size": 64, "intermediate_size": 512, "num_hidden_layers": 5,
    "num_attention_heads": 8, "num_key_value_heads": 8, "n_routed_experts": 96, "n_group": 1, "topk_group": 1,
    "kv_lora_rank": 96, "q_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "vocab_size": 4000, "num_experts_per_tok": 4, "torch_dtype": "bfloat16",
}  # fmt: skip
LARGE = SMALL | {
    "hidden_size": 1024, "moe_intermediate_size": 256, "intermediate_size": 4096, "num_hidden_layers": 13,
    "kv_lora_rank": 256, "q_lora_rank": 512, "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 64000,
    "qk_rope_head_dim": 64,
}  # fmt: skip
MARGIN = 600 * 10**6


@pytest.fixture(scope="module", params=["bfloat16", "fp8"])
def folder(request, tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("made") / "model", SMALL, 3, fp8=request.param == "fp8", mtp=1)


def stored(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, in its files."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        content = np.memmap(file, np.uint8, "r")
        start = 8 + int.from_bytes(content[:8].tobytes(), "little")
        for name, known in json.loads(content[8:start].tobytes()).items():
            if name != "__metadata__":
                first, last = (start + place for place in known["data_offsets"])
                kind = tensor_files.SAFETENSORS_DTYPES[known["dtype"]]
                tensors[name] = content[first:last].view(kind).reshape(known["shape"])
    return tensors


def value(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """A tensor's values; of FP8 by the rule."""
    values, scales = tensors[name], tensors.get(name + fp8.SCALE_SUFFIX)
    if scales is None:
        return values
    row, column = np.indices(values.shape) // 128
    return values.astype(np.float32) * scales[row, column]


def read_whole(folder: Path) -> dict[str, np.ndarray]:
    tensors = stored(folder)
    return {name: value(tensors, name) for name in tensors if not name.endswith(fp8.SCALE_SUFFIX)}


def expected_leaves(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Each leaf and its name, by loading the whole tensors: in float32."""
    config, tensors = read_model_config(folder), stored(folder)
    for tree, shapes in zip((PARAMS, ROUTING_BIAS), abstract_model(config)[1:], strict=True):
        for path, shape in jax.tree_util.tree_leaves_with_path(shapes):
            keys = tuple(key.key for key in path)
            made: Any = np.zeros(shape.shape, np.float32)
            for key in reversed(keys):
                made = {key: made}
            for entry in entries(config):
                parts = [part for part in entry.parts if (part.tree, part.path) == (tree, keys)]
                if parts:
                    entry._replace(parts=tuple(parts)).write({tree: made}, value(tensors, entry.torch_name))
            yield f"[{(PARAMS, ROUTING_BIAS).index(tree)}]{jax.tree_util.keystr(path)}", reader.leaf(made, keys)


def leaves_of(folder: Path) -> tuple[Any, Any]:
    """What is read, by loading everything first: in float32."""
    trees = abstract_model(read_model_config(folder))[1:]
    return jax.tree.unflatten(jax.tree.structure(trees), [leaf for _, leaf in expected_leaves(folder)])


def placed(folder: Path, mesh: str) -> Any:
    """Where a run on this mesh keeps its weights."""
    options: dict[str, Any] = {"mesh": mesh} if mesh else {}
    model = read_model_config(folder)
    config = TrainConfig.from_options(init=folder, model=model, seq_len=16, batch_size=8, **options)
    return choose_placement(config.mesh, config.data.batch_size).weight_shardings(config.model)


@pytest.fixture
def reads(monkeypatch) -> dict[str, list[tuple[int, int]]]:
    """The places of all bytes that are read, by file."""
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    read_into = tensor_files.read_into

    def counted(file, offset: int, view: memoryview) -> None:
        found[Path(file.name).name].append((offset, offset + view.nbytes))
        read_into(file, offset, view)

    monkeypatch.setattr(tensor_files, "read_into", counted)
    return found


@pytest.mark.parametrize(
    "mesh",
    [
        "data=2,fsdp=2,expert=2",
        *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("", "fsdp=8", "fsdp=4,expert=2")),
    ],
)
def test_each_byte_is_read_once_into_its_shards(mesh, folder, reads, monkeypatch):
    monkeypatch.setattr(reader, "MAX_IN_FLIGHT", 1)  # so that one tensor is read at a time
    expected = leaves_of(folder)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(expected))
    largest = max(values.size * 4 for values in read_whole(folder).values())
    tracemalloc.start()
    found = read_model(folder, place=placed(folder, mesh)).weights
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_same_bits(tuple(found), expected)
    read = 0
    for places in reads.values():
        places.sort()
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
        read += sum(end - start for start, end in places)
    with TensorFiles(folder) as files:
        bits = {name: np.dtype(tensor_files.SAFETENSORS_DTYPES[kind]).itemsize for name, kind in files.dtypes.items()}
        own = [name for name in files.shapes if not name.startswith("model.layers.5.")]
        assert read == sum(math.prod(files.shapes[name]) * bits[name] for name in own)
    assert peak < whole + 3 * largest + 2 * 10**6, (peak, whole, largest)
    for leaf, where in zip(jax.tree.leaves(tuple(found)), jax.tree.leaves(found), strict=True):
        assert leaf.sharding == where.sharding


def test_a_part_of_the_devices_reads_its_part_of_the_bytes(folder, reads):
    """As a process does whose devices hold the upper half of the experts and of the rows that `fsdp` cuts."""

    class Upper(SingleDeviceSharding):
        def addressable_devices_indices_map(self, shape):
            cut = max(range(len(shape)), key=lambda axis: (shape[axis] == 96, shape[axis]))
            half = tuple(slice(size // 2, None) if axis == cut else slice(None) for axis, size in enumerate(shape))
            return {jax.devices()[0]: half}

    with TensorFiles(folder) as files:
        made: dict[str, np.ndarray] = {}
        config = read_model_config(folder)
        trees = dict(zip((PARAMS, ROUTING_BIAS), abstract_model(config)[1:], strict=True))
        upper = Upper(jax.devices()[0])
        expected = dict(zip(trees, leaves_of(folder), strict=True))
        for entry in entries(config):
            for part in entry.parts:
                name = f"{part.tree} {'.'.join(part.path)}"
                shape = reader.leaf(trees[part.tree], part.path).shape
                if name not in made:
                    held = reader._Leaf(shape, np.float32, upper)
                    held.start()
                    made[name] = held
            reader._read_entry(files, entry, {tuple(_key(name)): held for name, held in made.items()})
        for name, held in made.items():
            tree, path = _key(name)
            whole = reader.leaf(expected[tree], path)
            ((box, buffer),) = held._buffers.items()
            np.testing.assert_array_equal(buffer, whole[tuple(slice(r.start, r.stop) for r in box)], err_msg=name)
        total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    read = sum(end - start for places in reads.values() for start, end in places)
    assert read < 0.6 * total


def _key(name: str) -> tuple[str, tuple[str, ...]]:
    tree, _, path = name.partition(" ")
    return tree, tuple(path.split("."))


@pytest.mark.parametrize("kind", [pytest.param("bfloat16", marks=pytest.mark.slow), "fp8"])
def test_weights_are_held_in_the_dtype_of_their_file(kind, tmp_path):
    folder = make_folder(tmp_path / "model", V3, 1, fp8=kind == "fp8")
    assert convert(["to-flax", str(folder), str(tmp_path / "run")]) == 0
    masters = read_model(folder).weights
    if kind == "fp8":  # whose products with the scales are rounded where they are not trained
        facts = Weights(*model_facts(read_model_config(folder)))
        masters = jax.tree.map(
            lambda leaf, known: leaf.astype("bfloat16").astype("float32") if is_narrow(known) else leaf, masters, facts
        )
    for held in (read_model(folder, hold=as_stored).weights, load_weights(tmp_path / "run", as_stored)[1]):
        assert_same_bits(jax.tree.map(lambda leaf: leaf.astype(np.float32), tuple(held)), tuple(masters))
        layers = held.params["decoder_layers"]
        assert layers["mlp"]["routed_experts"]["gate_proj"]["weight"].dtype == "bfloat16"
        assert layers["mlp"]["router"]["weight"].dtype == layers["input_norm"]["weight"].dtype == "float32"
    assert_same_bits(tuple(load_weights(tmp_path / "run")[1]), tuple(masters))
    if kind == "bfloat16":  # which are read as they are, and multiplied as if they were float32
        narrow, wide = generation.load_model(folder), from_pretrained(folder)
        assert narrow.token_embeddings.weight[...].dtype == "bfloat16"
        logits = nnx.jit(lambda model: model(np.arange(9)[None]))
        np.testing.assert_array_equal(logits(narrow), logits(wide))


# multi-token prediction


def exported(folder: Path, tmp_path: Path, *options: str) -> Path:
    if not (tmp_path / "run").exists():
        assert convert(["to-flax", str(folder), str(tmp_path / "run")]) == 0
    assert convert(["to-torch", str(tmp_path / "run"), str(tmp_path / "out"), *options]) == 0
    return tmp_path / "out"


def test_multi_token_prediction_comes_back_bit_for_bit(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(write_files, "MAX_SHARD_BYTES", 10_000_000)
    out = exported(folder, tmp_path)
    before, after = read_whole(folder), read_whole(out)
    assert before.keys() == after.keys()
    assert len([name for name in after if name.startswith("model.layers.5.")]) > 96
    for name, values in after.items():
        np.testing.assert_array_equal(values, before[name].astype(values.dtype), err_msg=name)
        assert values.dtype == ("float32" if name.endswith("e_score_correction_bias") else "bfloat16")
    assert len([*out.glob("model-*.safetensors")]) > 2
    assert read_json(out / "config.json")["num_nextn_predict_layers"] == 1
    card = (out / "README.md").read_text()
    assert "| multi-token prediction | " in card
    assert "this training did not change them" in card
    assert "which were not trained" in capsys.readouterr().out


def test_multi_token_prediction_is_left_out_if_asked_or_in_a_piece(folder, tmp_path):
    out = exported(folder, tmp_path, "--drop-mtp")
    assert not [name for name in read_whole(out) if name.startswith("model.layers.5.")]
    assert read_json(out / "config.json")["num_nextn_predict_layers"] == 0
    assert "multi-token" not in (out / "README.md").read_text()
    assert convert(["to-flax", str(folder), str(tmp_path / "piece"), "--layers", "2"]) == 0
    assert convert(["to-torch", str(tmp_path / "piece"), str(tmp_path / "piece-out")]) == 0
    assert not [name for name in read_whole(tmp_path / "piece-out") if name.startswith("model.layers.2.")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda source: source.rename(source.parent / "elsewhere"), "which is not there: put the folder back"),
        (lambda source: write_json(source / "config.json", V3), "whose config.json is not the one"),
        (lambda source: (source / "model-00003-of-00003.safetensors").unlink(), "does not hold"),
    ],
)
def test_a_source_that_has_gone_is_named_before_anything_is_written(change, message, tmp_path, capsys):
    source = make_folder(tmp_path / "source", V3, 3, mtp=1)
    assert convert(["to-flax", str(source), str(tmp_path / "run")]) == 0
    change(source)
    capsys.readouterr()
    assert convert(["to-torch", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    assert convert(["to-torch", str(tmp_path / "run"), str(tmp_path / "out"), "--drop-mtp"]) == 0


# what is not whole


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    source = make_folder(tmp_path / "source", V3, 1)
    (file,) = source.glob("*.safetensors")
    with TensorFiles(source) as files:
        os.truncate(file, file.stat().st_size - 10)
        with pytest.raises(UserError, match=r"cannot be read \(.*safetensors ends before its last tensor"):
            _ = [files.read(name) for name in files.shapes]
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        read_folder(source)


def test_a_disk_that_fills_during_the_export_leaves_nothing(tmp_path, capsys):
    import resource

    source = make_folder(tmp_path / "source", V3, 1)
    assert convert(["to-flax", str(source), str(tmp_path / "run")]) == 0
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        assert convert(["to-torch", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert "model.safetensors: File too large: free space" in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "source"]


def test_an_export_that_the_disk_has_no_room_for_is_not_begun(tmp_path, monkeypatch, capsys):
    source = make_folder(tmp_path / "source", V3, 1)
    assert convert(["to-flax", str(source), str(tmp_path / "run")]) == 0
    capsys.readouterr()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    assert convert(["to-torch", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "0.0 GB are free there: free space or" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_in_place_of_weights_is_refused_with_the_remedy(tmp_path):
    source = make_folder(tmp_path / "source", V3, 1)
    assert convert(["to-flax", str(source), str(tmp_path / "run")]) == 0
    with pytest.raises(UserError, match=r"is a run, not a folder of weights: export it with `python -m convert to-t"):
        read_model(tmp_path / "run")
    (tmp_path / "torch_run" / "checkpoint-20").mkdir(parents=True)
    with pytest.raises(UserError, match=r"is a run, not a folder of weights: pass one of its checkpoint-N"):
        weight_files(tmp_path / "torch_run", lambda _: True)


# large ones


def streamed(folder: Path, mesh: str, devices: int, *distributed: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.streaming", str(folder), mesh, *distributed]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[1]
    return subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_two_gigabytes_take_the_share_of_a_process(kind, tmp_path):
    folder = make_folder(tmp_path / "large", LARGE, 5, fp8=kind == "fp8")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    largest = max(values.size * 4 for values in stored(folder).values())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    found = []
    for mesh, devices, others in (
        ("", 1, [()]),
        ("fsdp=8", 8, [()]),
        ("fsdp=8", 4, [("0", "2", port), ("1", "2", port)]),
    ):
        processes = [streamed(folder, mesh, devices, *other) for other in others]  # no more at the same time
        for process in processes:
            said = json.loads(process.communicate(timeout=900)[0].splitlines()[-1])
            assert process.returncode == 0
            print(kind, mesh, f"{len(processes)} processes", {key: said[key] for key in ("read", "share", "peak")})
            assert said["peak"] < said["share"] + largest + MARGIN, said
            assert said["read"] < size / len(processes) + 40 * 10**6  # headers, scales, and what Python itself reads
            found.append(said["found"])
    for name, whole in expected_leaves(folder):
        narrow = not any(part in name for part in ("norm", "router", "bias"))
        for parts in found:
            for place, bits in parts[name]:
                part = whole[tuple(slice(*ends) for ends in place)]
                assert bits == digest(part.astype(tensor_files.SAFETENSORS_DTYPES["BF16"]) if narrow else part), name


@pytest.mark.slow
def test_an_index_of_140_000_names_opens_in_seconds(tmp_path):
    many = V3 | {"hidden_size": 8, "moe_intermediate_size": 8, "num_hidden_layers": 61, "n_routed_experts": 384}
    folder = make_folder(tmp_path / "many", many, 61, fp8=True)
    assert len(read_json(folder / "model.safetensors.index.json", 2**26)["weight_map"]) > 139_000
    started = time.process_time()
    with TensorFiles(folder) as files:
        assert len(files.shapes) > 139_000
    assert time.process_time() - started < 10
    read_model(folder)
    assert time.process_time() - started < 60
