"""Hostile and damaged files: one clear error or a good result; no crash, no hang, nothing run, nothing else touched.

python -m pytest -n 0 -m slow tests/test_fuzz.py      # many thousand cases, others each time
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fuzz_guard import in_memory, outcome, refused, same
from fuzz_strategies import TEXTS, VALUES, changed, damaged, json_files, written
from fuzz_tokenizers import CODE, tokenizer_folders
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from convert.mapping import entries
from convert.tensor_files import TensorFiles
from convert.to_flax import import_run, read_weights
from convert.to_torch import write_model
from convert.training import export_training, import_training
from jaxllm import generate as generation
from jaxllm.config import ModelConfig, TrainConfig
from jaxllm.data.source import TextChunk
from jaxllm.data.stream import Position, read_position
from jaxllm.data.tokenizer import align, encode_prompt, load_tokenizer, train_tokenizer
from jaxllm.errors import UserError
from jaxllm.files import read_json, write_json
from jaxllm.model.decoder import abstract_model
from jaxllm.store.checkpoint import CheckpointReader, Weights, load_weights
from jaxllm.store.checkpoint_writer import write_run
from jaxllm.store.folder import read_model_config
from jaxllm.store.resume import check_resumable
from jaxllm.train.state import init_state
from tests.configs import open_files, small

MODEL = small(
    vocab_size=300, hidden_size=16, num_hidden_layers=1, moe_intermediate_size=8, n_routed_experts=2,
    max_position_embeddings=32, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
CONFIG = TrainConfig.from_options(model=MODEL, seq_len=16, batch_size=4, run_dir=Path("run"))

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
    config = CONFIG.with_options(run_dir=tmp_path, data_streams=2)

    def check(case: tuple[bytes, bytes]) -> None:
        replace(tmp_path, "train_config.json", case[0])
        replace(tmp_path / "model", "config.json", case[1])
        values = outcome(tmp_path, lambda: read_json(tmp_path / "train_config.json"))
        if isinstance(values, dict):
            read = outcome(tmp_path, lambda: TrainConfig.from_dict(values))
            assert isinstance(read, UserError) or TrainConfig.from_dict(json.loads(json.dumps(read.to_dict()))) == read
            outcome(tmp_path, lambda: config.with_options(data_streams=values.get("data_streams")))
        outcome(tmp_path, lambda: check_resumable(config))
        model = outcome(tmp_path, lambda: read_model_config(tmp_path / "model"))
        assert isinstance(model, UserError) or ModelConfig.from_dict(model.to_dict()) == model

    files = st.tuples(json_files(config.to_dict()), json_files(MODEL.to_dict()))
    fuzz(many, 80, 3000, files, check)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ('{"model": {"x\\n": 1, "x\\n": 2}}', "occurs twice"),
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
    refused(tmp_path, lambda: read_position(folder / "position", 16, 300), "a file is expected")
    refused(tmp_path, lambda: load_tokenizer(str(folder)), "a file is expected")
    refused(tmp_path, lambda: list(open_files(folder / "rows.jsonl").chunks()))
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
    state = jax.jit(lambda: init_state(CONFIG.model, CONFIG.optim, CONFIG.seed))()
    return Weights(state.params, state.routing_bias)


@pytest.fixture(scope="module")
def exported(weights, corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    write_model(MODEL, weights, out, "float32")
    train_tokenizer(open_files(corpus), 300).save_pretrained(str(out))
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
    refused(tmp_path, lambda: read_weights(folder, MODEL), "'lm_head.bias' occurs twice")


class Payload:
    """Pickled, it asks whoever reads it to call a function."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def torch_archive(file: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """A file as PyTorch writes it, around any pickle."""
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


@FEW_OR_MANY
def test_torch_files(many, exported, weights, tmp_path):
    torch = pytest.importorskip("torch")
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    state = {name: torch.from_numpy(values.copy()) for name, values in read_all(folder).items()}
    contents = []
    for new_format in (True, False):
        torch.save(state, tmp_path / "state.bin", _use_new_zipfile_serialization=new_format)
        assert same(outcome(tmp_path, lambda: read_weights(tmp_path / "state.bin", MODEL)), weights)
        contents.append((tmp_path / "state.bin").read_bytes())
    # where the names and shapes are, rather than where the many values are
    contents += [contents[0][: contents[0].index(b"/data/0")], contents[1][:8000]]

    def check(content: bytes) -> None:
        replace(tmp_path, "state.bin", content)
        read = outcome(tmp_path, lambda: read_weights(tmp_path / "state.bin", MODEL))
        if isinstance(read, Weights):
            assert jax.tree.map(np.shape, read) == jax.tree.map(np.shape, weights)

    rest = [b"", b"", contents[0][len(contents[2]) :], contents[1][8000:]]
    files = st.sampled_from([0, 1, 2, 2, 2, 3, 3, 3]).flatmap(
        lambda number: damaged(contents[number]).map(lambda content: content + rest[number])
    )
    fuzz(many, 60, 2000, files, check)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize(
    "payload",
    [
        Payload(os.system, "touch exploded"),
        Payload(eval, "open('exploded', 'w')"),
        Payload(bytearray, 10**12),
        Payload(bytearray, 2 * 10**9),
    ],
)
def test_a_pickle_runs_nothing_and_takes_nothing(payload, archive, protocol, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "state.bin"
    state = {"lm_head.bias": payload}
    if archive:
        torch_archive(file, pickle.dumps(state, protocol))
    else:
        from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

        first = [MAGIC_NUMBER, PROTOCOL_VERSION, {"little_endian": True}, state, []]
        file.write_bytes(b"".join(pickle.dumps(value, protocol) for value in first))
    with in_memory(2**27):
        refused(tmp_path, lambda: TensorFiles(file), "safe to read")
    assert not (tmp_path / "exploded").exists()
    del torch


def test_a_compressed_archive_is_not_blown_up(tmp_path):
    pytest.importorskip("torch")
    torch_archive(tmp_path / "state.bin", pickle.dumps({"a" * 2**27: 0}, 2), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "state.bin").stat().st_size < 2**20
    with in_memory(2**26):
        refused(tmp_path, lambda: TensorFiles(tmp_path / "state.bin"), "compressed")


def test_few_bytes_that_pose_as_a_large_model_take_no_memory(tmp_path):
    torch = pytest.importorskip("torch")
    large = dataclasses.replace(MODEL, hidden_size=4096, vocab_size=2**22)
    _, params, bias = abstract_model(large)
    one = torch.zeros(1)
    trees = {"params": params, "routing_bias": bias}
    state = {entry.torch_name: one.expand(entry.shape(trees)) for entry in entries(large)}
    torch.save(state, tmp_path / "state.bin")
    with in_memory(2**27):
        refused(tmp_path, lambda: read_weights(tmp_path / "state.bin", large), "do not hold")


def test_tensors_that_numpy_does_not_have_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    state = {
        "sparse": torch.eye(3).to_sparse(), "meta": torch.zeros(3, device="meta"), "complex": torch.zeros(3).cfloat(),
    }  # fmt: skip
    torch.save(state, tmp_path / "state.bin")
    files = outcome(tmp_path, lambda: TensorFiles(tmp_path / "state.bin"))
    for name in () if isinstance(files, UserError) else ("sparse", "meta"):
        refused(tmp_path, lambda name=name: files.read(name), "cannot be read")


# tokenizers


@FEW_OR_MANY
def test_tokenizers(many, exported, tmp_path):
    names = ("tokenizer.json", "tokenizer_config.json")
    contents = {name: json.loads((exported / name).read_text()) for name in names}
    (tmp_path / "in").mkdir()
    canary = Path(shutil.copy(exported / "tokenizer.json", tmp_path / "tokenizer.4.0.0.json"))  # whole, and elsewhere
    (tmp_path / "in" / "evil.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    number = itertools.count()

    def check(case: dict[str, bytes]) -> None:
        folder = tmp_path / "in" / str(next(number))
        folder.mkdir()
        for name in names:
            shutil.copy(exported / name, folder)
        shutil.copy(tmp_path / "in" / "evil.py", folder)
        for name, content in case.items():
            replace(folder, name, content)
        tokenizer = outcome(tmp_path / "in", lambda: load_tokenizer(str(folder)))
        if not isinstance(tokenizer, UserError):
            outcome(tmp_path / "in", lambda: align(CONFIG, tokenizer))
            ids = outcome(tmp_path / "in", lambda: encode_prompt(tokenizer, "a" * 50 + "! def f(x):"))
            assert isinstance(ids, UserError) or isinstance(tokenizer.decode(ids), str)
        shutil.rmtree(folder)
        assert not (tmp_path / "exploded").exists()

    fuzz(many, 60, 1500, tokenizer_folders(contents, str(canary)), check)


@pytest.mark.parametrize(
    "changes",
    [
        {"fast_tokenizer_files": ["{outside}/tokenizer.4.0.0.json"]},
        {"fast_tokenizer_files": ["../../tokenizer.4.0.0.json"]},
        {"gguf_file": "{outside}/tokenizer.4.0.0.json"},
        {"init_inputs": ["{outside}/tokenizer.4.0.0.json"]},
    ],
)
def test_a_tokenizer_that_leads_elsewhere_is_refused(changes, exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "in" / "copy"))
    shutil.copy(folder / "tokenizer.json", tmp_path / "tokenizer.4.0.0.json")
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(read_json(config) | changes).replace("{outside}", str(tmp_path)))
    refused(tmp_path / "in", lambda: load_tokenizer(str(folder)), "leave it to tokenizer.json")


def test_code_next_to_a_tokenizer_is_not_run(exported, tmp_path):
    """Classes that the folder names, and the templates that it brings, are neither imported nor rendered."""
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')\nclass Evil: pass\n")
    config = read_json(folder / "tokenizer_config.json")
    hostile = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    write_json(folder / "tokenizer_config.json", config | hostile | {"chat_template": CODE})
    (folder / "chat_template.jinja").write_text(CODE)
    tokenizer = outcome(tmp_path, lambda: load_tokenizer(str(folder)))
    assert encode_prompt(tokenizer, "def f") == encode_prompt(load_tokenizer(str(exported)), "def f")
    assert not (tmp_path / "exploded").exists()


def test_a_text_is_not_blown_up(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    contents = read_json(folder / "tokenizer.json", 2**30)
    for part, kind in (("normalizer", "normalizers"), ("decoder", "decoders")):
        steps = [{"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 8}] * 12
        write_json(folder / "tokenizer.json", contents | {part: {"type": "Sequence", kind: steps}})
        with in_memory():
            refused(tmp_path, lambda: load_tokenizer(str(folder)), "it is not a tokenizer")


@pytest.mark.parametrize("number", [2**24, 2**31, 2**32 - 1])
def test_a_token_with_a_huge_number_takes_no_memory(number, exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    contents = read_json(folder / "tokenizer.json", 2**30)
    contents["model"]["vocab"]["<huge>"] = number
    write_json(folder / "tokenizer.json", contents)
    tokenizer = outcome(tmp_path, lambda: load_tokenizer(str(folder)))
    with in_memory(2**27):
        refused(tmp_path, lambda: align(TrainConfig(), tokenizer), f"vocab_size is {number + 1}")


def test_an_unusable_tokenizer_is_refused_before_any_text(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}  # it has no such token
    contents = read_json(folder / "tokenizer.json", 2**30)
    write_json(folder / "tokenizer.json", contents | {"model": model})
    refused(tmp_path, lambda: load_tokenizer(str(folder)), "could not be loaded")
    write_json(folder / "tokenizer.json", contents)
    write_json(folder / "tokenizer_config.json", {})
    tokenizer = load_tokenizer(str(folder))
    refused(tmp_path, lambda: align(CONFIG, tokenizer), "no end-of-sequence token")
    refused(tmp_path, lambda: encode_prompt(tokenizer, ""), "prompt is empty")


# data


@FEW_OR_MANY
def test_jsonl(many, tmp_path):
    def check(lines: list[bytes]) -> None:
        replace(tmp_path, "rows.jsonl", b"\n".join(lines))
        chunks = outcome(tmp_path, lambda: read_chunks(tmp_path / "rows.jsonl"))
        assert isinstance(chunks, UserError) or all(chunk.text.encode() for chunk in chunks)

    row = st.fixed_dictionaries({"text": st.one_of(TEXTS, TEXTS, VALUES)}).map(written)
    hostile = [b'{"text":' * 100_000, b"[" * 100_000, b'{"text": ' + b"9" * 5000 + b"}", b'{"text": NaN}', b"\0" * 100]
    line = st.one_of(
        row, row, VALUES.map(written), row.flatmap(damaged), st.binary(max_size=60), st.sampled_from(hostile)
    )
    fuzz(many, 60, 2000, st.lists(line, max_size=6), check)


@FEW_OR_MANY
def test_text_files(many, tmp_path):
    def check(content: bytes) -> None:
        replace(tmp_path, "text.txt", content)
        chunks = outcome(tmp_path, lambda: read_chunks(tmp_path / "text.txt"))
        assert isinstance(chunks, UserError) or all(chunk.text.encode() for chunk in chunks)

    odd = st.sampled_from([b"\0" * 9000, b"\xff" * 9000, b"\r" * 9000, b"\xed\xa0\x80", "\u2028".encode() * 3000])
    fuzz(many, 30, 500, st.one_of(st.binary(max_size=300), odd), check)


@pytest.mark.slow
@FEW_OR_MANY
def test_parquet(many, tmp_path):
    rows = [{"text": f"row {i}", "n": i} for i in range(40)]
    contents = []
    for compression in ("snappy", "zstd", "none"):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=9, compression=compression
        )
        contents.append((tmp_path / "a.parquet").read_bytes())
        assert len(outcome(tmp_path, lambda: read_chunks(tmp_path / "a.parquet"))) == len(rows)

    def check(content: bytes) -> None:
        replace(tmp_path, "a.parquet", content)
        chunks = outcome(tmp_path, lambda: read_chunks(tmp_path / "a.parquet"))
        assert isinstance(chunks, UserError) or all(chunk.text.encode() for chunk in chunks)

    fuzz(many, 20, 2000, st.sampled_from(contents).flatmap(damaged), check)


def test_parquet_with_bytes_that_are_no_text(tmp_path):
    """Parquet calls a column a string; nothing in it says that its bytes are UTF-8."""
    bad = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(np.int32([0, 4])), pyarrow.py_buffer(b"ab\xffc"))
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "a.parquet")
    (chunk,) = outcome(tmp_path, lambda: read_chunks(tmp_path / "a.parquet"))
    assert chunk.text == "ab\ufffdc"


@pytest.mark.slow
def test_parquet_is_not_blown_up(tmp_path):
    """A long text that a column repeats lies in the file once."""
    repeated = pyarrow.DictionaryArray.from_arrays(np.zeros(400, np.int32), ["a" * 2**21])
    pyarrow.parquet.write_table(pyarrow.table({"text": repeated}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 2**18
    with in_memory():
        first = outcome(tmp_path, lambda: next(open_files(tmp_path / "a.parquet").chunks()))
    assert isinstance(first, UserError | TextChunk)


def test_names_of_fields_do_not_break_a_message(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({f"a\nb{i}": [1] for i in range(1000)}), tmp_path / "a.parquet")
    refused(tmp_path, lambda: read_chunks(tmp_path / "a.parquet"), "--text-field")


def read_chunks(file: Path) -> list[TextChunk]:
    return list(open_files(file).chunks())


# data positions, and PyTorch runs


@FEW_OR_MANY
def test_positions(many, tmp_path):
    tokens, pool = np.arange(5, dtype=np.int32), np.arange(48, dtype=np.int32).reshape(3, 16)
    (tmp_path / "position").write_bytes(Position({"pass": 0, "file": 1}, 7, tokens, pool).to_bytes())
    header, data = header_and_data(tmp_path / "position")

    def check(content: bytes) -> None:
        replace(tmp_path, "position", content)
        position = outcome(tmp_path, lambda: read_position(tmp_path / "position", seq_len=16, vocab_size=300))
        if isinstance(position, Position):
            assert isinstance(position.source, dict)
            assert 0 <= position.drawn < 2**63
            for values, dimensions in ((position.tokens, 1), (position.pool, 2)):
                assert values.dtype == np.int32
                assert values.ndim == dimensions
                assert ((values >= 0) & (values < 300)).all()
            assert position.pool.shape[1] == 16

    fuzz(many, 60, 1500, safetensors_files(header, data), check)


@pytest.mark.parametrize(
    ("tokens", "pool", "drawn"),
    [
        (np.zeros(2, np.float32), np.zeros((2, 16), np.int32), "1"),
        (np.zeros(2, np.int64), np.zeros((2, 16), np.int32), "1"),
        (np.array([-1], np.int32), np.zeros((2, 16), np.int32), "1"),
        (np.array([300], np.int32), np.zeros((2, 16), np.int32), "1"),
        (np.zeros(2, np.int32), np.full((2, 16), 300, np.int32), "1"),
        (np.zeros(2, np.int32), np.zeros((2, 15), np.int32), "1"),
        (np.zeros(2, np.int32), np.zeros((2, 16), np.int32), "-1"),
        (np.zeros(2, np.int32), np.zeros((2, 16), np.int32), str(2**63)),
        (np.zeros(2, np.int32), np.zeros((2, 16), np.int32), "9" * 5000),
    ],
)
def test_a_position_of_another_run_is_refused(tokens, pool, drawn, tmp_path):
    state = np.frombuffer(b'{"source": {}, "drawn": %s}' % drawn.encode(), np.uint8)
    save_file({"tokens": tokens, "pool": pool, "state": state}, tmp_path / "position")
    refused(tmp_path, lambda: read_position(tmp_path / "position", seq_len=16, vocab_size=300), "position")


@FEW_OR_MANY
def test_states_of_pytorch_runs(many, tmp_path):
    checkpoints = pytest.importorskip("torch_ref.checkpoint")
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in (*checkpoints.NEEDED, checkpoints.STATE_FILE):
            write_json(tmp_path / f"checkpoint-{step}" / name, {"global_step": step, "train_batch_size": 4})
    assert checkpoints.last_checkpoint(tmp_path).step == 2

    def check(content: bytes) -> None:
        replace(tmp_path / "checkpoint-2", checkpoints.STATE_FILE, content)
        found = outcome(tmp_path, lambda: checkpoints.last_checkpoint(tmp_path))
        assert isinstance(found, UserError) or (type(found.step) is int and 0 <= found.step < 2**31)

    fuzz(many, 40, 1000, json_files({"global_step": 2, "train_batch_size": 4, "log_history": [{"loss": 1.5}]}), check)


@pytest.mark.parametrize(
    "kind", ["code", "memory", "sparse", "no number", "two counts", "short", "empty", "other rows"]
)
def test_what_a_pytorch_run_learned(kind, run, tmp_path, monkeypatch):
    """`optimizer.pt` and the data position of a run that is handed over."""
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    export_training(run, source)
    file = source / "checkpoint-20" / "optimizer.pt"
    saved = torch.load(file, weights_only=True)
    first = saved["state"][0]
    if kind in ("code", "memory"):
        payload = Payload(os.system, "touch exploded") if kind == "code" else Payload(bytearray, 2 * 10**9)
        torch_archive(file, pickle.dumps({"state": payload}, 2))
    elif kind == "other rows":
        position = Position({"pass": 0}, 0, np.zeros(3, np.int32), np.zeros((2, 7), np.int32))
        (file.parent / "data_position.safetensors").write_bytes(position.to_bytes())
    else:
        saved["state"][0] = {
            "sparse": first | {"exp_avg": first["exp_avg"].to_sparse()},
            "no number": first | {"step": torch.tensor(float("nan"))},
            "two counts": first | {"step": torch.tensor([20, 20])},
            "short": first | {"exp_avg": first["exp_avg"][:1]},
            "empty": {},
        }[kind]
        torch.save(saved, file)
    with in_memory():
        refused(tmp_path, lambda: import_training(source, tmp_path / "back"))
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "back").exists()


# runs


@st.composite
def broken_runs(draw, files: dict[str, bytes]) -> dict[str, bytes | None]:
    """Files of a run that are damaged, hostile, or gone (None)."""
    broken: dict[str, bytes | None] = {}
    for name in draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=2, unique=True)):
        kind = draw(st.sampled_from(["damaged", "damaged", "gone", "other", "json"]))
        content = files[name]
        if kind == "json" and content.startswith(b"{"):
            broken[name] = written(draw(changed(json.loads(content), deep=12)))
        elif kind == "other":
            broken[name] = draw(st.sampled_from([b"", b"{}", bytes(100), pickle.dumps(Payload(os.system, "exit 1"))]))
        else:
            broken[name] = None if kind == "gone" else draw(damaged(content))
    return broken


def breaking(run: Path, folder: Path, below: str = "") -> tuple[dict[str, bytes], Callable[[dict], Path]]:
    """The files of a run, and how to make a copy of it with some of them changed."""
    files = {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}

    def make(broken: dict[str, bytes | None]) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        copy = Path(shutil.copytree(run, folder / "run"))
        for name, content in broken.items():
            (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
        return copy

    return {name: content for name, content in files.items() if name.startswith(below)}, make


def without_the_newest(run: Path) -> Path:
    shutil.rmtree(run / "checkpoints" / "20")
    return run


@FEW_OR_MANY
def test_checkpoints(many, run, tmp_path):
    """Weights are those that were saved, perhaps by the checkpoint before, or are refused: never others."""
    files, make = breaking(run, tmp_path / "in", below="checkpoints/")
    files |= {"config.json": (run / "config.json").read_bytes()}
    saved = [load_weights(run)[1], load_weights(without_the_newest(make({})))[1]]
    assert not same(*saved)

    def check(broken: dict[str, bytes | None]) -> None:
        copy = make(broken)
        read = outcome(tmp_path / "in", lambda: load_weights(copy))
        assert isinstance(read, UserError) or any(same(read[1], one) for one in saved), (
            f"other weights, after {sorted(broken)}"
        )

    fuzz(many, 25, 800, broken_runs(files), check)


@pytest.mark.slow
@FEW_OR_MANY
def test_wrong_metadata_of_orbax_arrays(many, weights, tmp_path):
    """Metadata that lies: what restores the arrays must bear it, for a checksum may have been made of the lie."""
    write_run(tmp_path / "saved", MODEL, weights)
    files, make = breaking(tmp_path / "saved", tmp_path / "in", below="checkpoints/")
    files = {name: content for name, content in files.items() if content.startswith(b"{")}
    assert len(files) >= 3

    def check(case: tuple[str, bytes]) -> None:
        copy = make(dict([case]))
        read = outcome(tmp_path / "in", lambda: CheckpointReader(copy, 0).weights(MODEL))
        assert isinstance(read, UserError) or same(read, weights), f"other weights, after {case}"

    cases = st.sampled_from(sorted(files)).flatmap(
        lambda name: st.tuples(st.just(name), changed(json.loads(files[name]), deep=12).map(written))
    )
    fuzz(many, 25, 800, cases, check)


@FEW_OR_MANY
def test_generation_from_broken_runs(many, run, tmp_path, capsys):
    """The whole command: the text of the whole run, or one line and exit code 2."""
    files, make = breaking(run, tmp_path / "in")
    config, checkpoints = files["config.json"], {n: c for n, c in files.items() if n.startswith("checkpoints/20/")}
    tokenizer = {name: content for name, content in files.items() if name.startswith("tokenizer/")}

    def text_of(folder: Path) -> str | None:
        capsys.readouterr()
        code = outcome(
            tmp_path, lambda: generation.main([str(folder), "--prompt", "def ", "--greedy", "--max-new-tokens", "4"])
        )
        shown = capsys.readouterr()
        if code == 0:
            return shown.out
        assert code == 2
        errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, shown.err
        return None

    whole = [text_of(make({})), text_of(without_the_newest(make({})))]
    assert None not in whole

    def check(broken: dict[str, bytes | None]) -> None:
        text = text_of(make(broken))
        if broken.keys() <= checkpoints.keys():  # another config or tokenizer may well make another text
            assert text in (None, *whole), sorted(broken)

    cases = st.sampled_from([checkpoints, tokenizer, {"config.json": config}]).flatmap(broken_runs)
    fuzz(many, 6, 150, cases, check)


# what is written


@pytest.mark.parametrize(
    "kind", ["file", "full folder", "symlink to a full folder", "symlink to nothing", "below a file"]
)
def test_nothing_is_written_where_something_is(kind, exported, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("mine")
    out = tmp_path / "out"
    if kind == "symlink to a full folder":
        out.symlink_to(kept)
    elif kind == "symlink to nothing":
        out.symlink_to(tmp_path / "nothing")
    else:
        out = {"file": kept / "file", "full folder": kept, "below a file": kept / "file" / "out"}[kind]
    refused(tmp_path, lambda: import_run(exported, out))
    assert not (tmp_path / "nothing").exists()
    assert [path.name for path in kept.iterdir()] == ["file"]
    assert (kept / "file").read_text() == "mine"


def test_a_conversion_writes_into_its_new_folder_alone(exported, tmp_path):
    source = Path(shutil.copytree(exported, tmp_path / "source"))
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    (tmp_path / "out").mkdir()
    outcome(tmp_path, lambda: import_run(source, tmp_path / "out" / "run"))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run"]
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before
