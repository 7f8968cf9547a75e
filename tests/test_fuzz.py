"""Hostile and damaged files: one clear error or a good result; no crash, no hang, nothing run, nothing else touched.

python -m pytest -n 0 -m slow tests/test_fuzz.py      # many thousand cases, others each time
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from fuzz_guard import in_memory, outcome, refused, same
from fuzz_strategies import changed, damaged, json_files, written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from convert.tensor_files import TensorFiles
from convert.to_flax import read_weights
from convert.to_torch import write_model
from jaxllm.checkpoint import Weights, read_model_config
from jaxllm.config import ModelConfig, TrainConfig, read_json, write_json
from jaxllm.data.corpus import FileSource, local_files
from jaxllm.data.position import load_position
from jaxllm.data.tokenizer import load_tokenizer, train_tokenizer
from jaxllm.errors import UserError
from jaxllm.run import check_resumable, streams_of
from jaxllm.step import init_state

MODEL = ModelConfig(
    vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, moe_intermediate_size=8,
    n_routed_experts=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
CONFIG = TrainConfig(model=MODEL, seq_len=16, batch_size=4, run_dir=Path("run"))

FEW_OR_MANY = pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.slow)])


def fuzz(
    many: bool, few_cases: int, many_cases: int, strategy: st.SearchStrategy, check: Callable[[Any], None]
) -> None:
    """Few cases are the same each time, so that no build fails by chance."""
    cases = itertools.count()

    def counted(case: Any) -> None:
        next(cases)
        check(case)

    wanted = many_cases if many else few_cases
    started = time.perf_counter()
    with in_memory():
        settings(
            max_examples=wanted,
            derandomize=not many,
            database=None,
            deadline=None,  # `fuzz_guard.in_time` has one that does not depend on how busy the machine is
            suppress_health_check=list(HealthCheck),
        )(given(strategy)(counted))()
    done = next(cases)
    print(f"{check.__qualname__.split('.')[0]}: {done} cases in {time.perf_counter() - started:.1f} s")
    assert done >= wanted * 0.9  # a strategy that finds no more of them would make the test empty


def replace(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


# configs


@FEW_OR_MANY
def test_configs(many, tmp_path):
    """`config.json` and `train_config.json`, through everything that reads one."""
    (tmp_path / "model").mkdir()
    config = dataclasses.replace(CONFIG, run_dir=tmp_path, data_streams=2)

    def check(case: tuple[bytes, bytes]) -> None:
        replace(tmp_path, "train_config.json", case[0])
        replace(tmp_path / "model", "config.json", case[1])
        values = outcome(tmp_path, lambda: read_json(tmp_path / "train_config.json"))
        if isinstance(values, dict):
            read = outcome(tmp_path, lambda: TrainConfig.from_dict(values))
            assert isinstance(read, UserError) or TrainConfig.from_dict(json.loads(json.dumps(read.to_dict()))) == read
            outcome(tmp_path, lambda: dataclasses.replace(config, data_streams=streams_of(values)))
        outcome(tmp_path, lambda: check_resumable(config))
        model = outcome(tmp_path, lambda: read_model_config(tmp_path / "model"))
        assert isinstance(model, UserError) or ModelConfig.from_dict(model.to_dict()) == model

    files = st.tuples(json_files(config.to_dict()), json_files(MODEL.to_dict()))
    fuzz(many, 80, 3000, files, check)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' comes twice"),
        ('{"model": {"x\\n": 1, "x\\n": 2}}', "comes twice"),
        ('{"a": "\\ud800"}', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("\ufeff{}", "not valid JSON"),
    ],
)
def test_json_that_is_refused(text, part, tmp_path):
    replace(tmp_path, "config.json", text.encode())
    refused(tmp_path, lambda: read_json(tmp_path / "config.json"), part)


def test_a_config_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)  # takes no disk
    with in_memory(2**24):
        refused(tmp_path, lambda: read_json(tmp_path / "config.json"), "1099511627776 bytes")
    refused(tmp_path, lambda: read_model_config(tmp_path))


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 10**12},
        {"vocab_size": 10**12},
        {"num_hidden_layers": 10**9},
        {"n_routed_experts": 10**9},
        {
            "hidden_size": 2**20,
            "vocab_size": 2**24,
            "moe_intermediate_size": 2**20,
            "max_position_embeddings": 2**31 - 1,
        },
        {"num_hidden_layers": 2**12, "n_routed_experts": 2**14, "n_shared_experts": 2**14},
    ],
)
def test_absurd_sizes_take_no_memory(sizes, exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    write_json(folder / "config.json", MODEL.to_dict() | sizes)
    with in_memory(2**26):
        refused(tmp_path, lambda: read_weights(folder, read_model_config(folder)))


def test_many_rows_that_do_not_divide_are_refused_at_once(tmp_path):
    values = CONFIG.to_dict() | {"batch_size": 10**12, "mesh": "data=7"}
    refused(tmp_path, lambda: TrainConfig.from_dict(values), "batch_size is 1000000000000")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_refused_without_waiting(kind, exported, tmp_path):
    def put(file: Path) -> None:
        file.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(file)
        elif kind == "folder":
            file.mkdir()
        else:
            file.symlink_to("/dev/zero")

    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    for name in (
        "train_config.json",
        "position",
        "tokenizer_config.json",
        "rows.jsonl",
        "model.safetensors.index.json",
    ):
        put(folder / name)
    (folder / "model.safetensors").unlink()
    put(folder / "model.safetensors")
    refused(tmp_path, lambda: read_json(folder / "train_config.json"), "a file is expected")
    refused(tmp_path, lambda: load_position(folder / "position", 16, 300), "a file is expected")
    refused(tmp_path, lambda: load_tokenizer(str(folder)), "a file is expected")
    refused(tmp_path, lambda: list(FileSource(local_files(folder / "rows.jsonl"), 0, "text").pieces()))
    refused(tmp_path, lambda: TensorFiles(folder))
    refused(tmp_path, lambda: TensorFiles(folder / "model.safetensors"))


# a whole file or none


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    write_json(file, {"a": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(file, {"a": 2})
    assert read_json(file) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    monkeypatch.undo()
    write_json(file, {"a": 3})
    assert read_json(file) == {"a": 3}
    umask = os.umask(0)
    os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask


# weights in PyTorch's words


@pytest.fixture(scope="module")
def weights() -> Weights:
    state = init_state(CONFIG)
    return Weights(state.params, state.routing_bias)


@pytest.fixture(scope="module")
def exported(weights, corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    write_model(MODEL, weights, out, "float32")
    train_tokenizer(FileSource(local_files(corpus), 0, "text"), 300).save_pretrained(str(out))
    return out


def header_and_data(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


@st.composite
def safetensors_files(draw, header: dict[str, Any], data: bytes) -> bytes:
    kind = draw(st.sampled_from(["header", "header", "bytes", "length", "twice", "swapped"]))
    if kind == "header":
        return with_header(written(draw(changed(header))), data)
    if kind == "bytes":
        return draw(damaged(with_header(written(header), data)))
    if kind == "length":
        length = draw(st.one_of(st.sampled_from([0, 2**31, 2**60, 2**63, 2**64 - 1]), st.integers(0, 2**64 - 1)))
        return with_header(written(header), data, length)
    names = draw(st.lists(st.sampled_from(sorted(header)), min_size=2, max_size=2, unique=True))
    if kind == "twice":
        return with_header(b"{" + written({names[0]: header[names[0]]})[1:-1] + b"," + written(header)[1:], data)
    part = draw(st.sampled_from(["data_offsets", "shape", "dtype"]))
    one, other = (header[name] for name in names)
    return with_header(
        written(header | {names[0]: one | {part: other.get(part)}, names[1]: other | {part: one.get(part)}}), data
    )


@FEW_OR_MANY
def test_safetensors(many, exported, weights, tmp_path):
    header, data = header_and_data(exported / "model.safetensors")
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    assert same(outcome(tmp_path, lambda: read_weights(folder, MODEL)), weights)

    def check(content: bytes) -> None:
        replace(folder, "model.safetensors", content)
        outcome(tmp_path, lambda: read_all(folder))
        read = outcome(tmp_path, lambda: read_weights(folder, MODEL))
        if isinstance(read, Weights):  # whatever was let through has the shapes of the model
            assert jax.tree.map(np.shape, read) == jax.tree.map(np.shape, weights)

    fuzz(many, 60, 2500, safetensors_files(header, data), check)


def read_all(folder: Path) -> dict[str, np.ndarray]:
    with TensorFiles(folder) as files:
        tensors = {name: files.read(name) for name in files.shapes}
        assert {name: values.shape for name, values in tensors.items()} == files.shapes
    return tensors


@FEW_OR_MANY
def test_indexes(many, exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "in" / "copy"))
    tensors = read_all(folder)
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    for shard in range(2):
        save_file({name: tensors[name] for name in names[shard::2]}, folder / f"shard{shard}.safetensors")
    shutil.copy(folder / "shard0.safetensors", tmp_path / "outside.safetensors")  # a canary: whole, and elsewhere
    weight_map = {name: f"shard{i % 2}.safetensors" for i, name in enumerate(names)}
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    assert isinstance(outcome(tmp_path / "in", lambda: read_weights(folder, MODEL)), Weights)

    def check(content: bytes) -> None:
        replace(folder, "model.safetensors.index.json", content)
        read = outcome(tmp_path / "in", lambda: read_weights(folder, MODEL))
        if isinstance(read, Weights):
            assert read_json(folder / "model.safetensors.index.json")["weight_map"].items() <= weight_map.items()

    fuzz(many, 60, 1500, json_files({"metadata": {"total_size": 1}, "weight_map": weight_map}), check)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "{outside}",
        "./shard.safetensors",
        "",
        ".",
        "..",
        "x" * 300,
        "config.json",
        7,
        None,
        "\0",
    ],
)
def test_names_in_an_index_are_plain_names(name, exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "in" / "copy"))
    outside = shutil.copy(folder / "model.safetensors", tmp_path / "outside.safetensors")
    name = name.format(outside=outside) if isinstance(name, str) else name
    weight_map = dict.fromkeys(read_all(folder), name)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    refused(tmp_path / "in", lambda: read_weights(folder, MODEL), "names the file")


def test_weights_may_be_symlinks_as_in_the_hubs_cache(exported, weights, tmp_path):
    snapshot = Path(shutil.copytree(exported, tmp_path / "snapshots" / "1"))
    (tmp_path / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(tmp_path / "blobs" / "0f")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0f")
    assert same(outcome(tmp_path, lambda: read_weights(snapshot, MODEL)), weights)


def test_an_index_and_its_files_must_agree(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    tensors = read_all(folder)
    save_file({"lm_head.bias": tensors.pop("lm_head.bias")}, folder / "b.safetensors")
    save_file(tensors, folder / "model.safetensors")
    weight_map = dict.fromkeys(tensors, "model.safetensors") | {"lm_head.bias": "b.safetensors"}
    index = folder / "model.safetensors.index.json"
    write_json(index, {"weight_map": weight_map})
    assert isinstance(outcome(tmp_path, lambda: read_weights(folder, MODEL)), Weights)
    write_json(index, {"weight_map": weight_map | {"lm_head.weight": "b.safetensors"}})
    refused(tmp_path, lambda: read_weights(folder, MODEL), "not in the file that the index names: lm_head.weight")
    write_json(index, {"weight_map": weight_map})
    (folder / "b.safetensors").unlink()
    refused(tmp_path, lambda: read_weights(folder, MODEL), "'b.safetensors', which the folder does not hold")


def test_a_tensor_with_two_places_is_refused(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    header, data = header_and_data(folder / "model.safetensors")
    again = written({"lm_head.bias": header["lm_head.bias"]})
    replace(folder, "model.safetensors", with_header(again[:-1] + b"," + written(header)[1:], data))
    refused(tmp_path, lambda: read_weights(folder, MODEL), "'lm_head.bias' comes twice")
