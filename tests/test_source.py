"""What came with the weights of a run: never replaced without a word, found in the Hub's cache, kept when killed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train
from convert.to_flax import import_run, read_folder
from convert.to_torch import export_run, write_model
from jaxllm.config import TrainConfig
from jaxllm.config.families import read_config
from jaxllm.data.tokenizer import load_tokenizer, train_tokenizer
from jaxllm.errors import UserError
from jaxllm.files import read_json, write_json
from jaxllm.run.arguments import parse_args
from jaxllm.run.prepare import Prepared, prepare
from jaxllm.store.checkpoint_writer import CheckpointWriter
from jaxllm.store.lock import FolderLock
from jaxllm.store.source import source_files
from tests.configs import open_files
from tests.test_families import V3, assert_same_bits, numbered_weights

SOURCE = V3 | {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "float32"}
KINDS = {
    "tiktoken.model": ("tiktoken.model", "tokenization_moonshot.py", "tokenizer_config.json"),
    "qwen.tiktoken": ("qwen.tiktoken",),
    "tokenizer.model": ("tokenizer.model", "tokenizer_config.json"),
    "spiece.model": ("spiece.model",),
    "vocab.txt": ("vocab.txt", "tokenizer_config.json"),
    "tekken.json": ("tekken.json",),
    "merges.txt, vocab.json, vocab.txt": ("vocab.json", "merges.txt", "vocab.txt"),
    "vocab.json": ("vocab.json",),
    "holds no tokenizer.json": ("special_tokens_map.json",),
}


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(open_files(corpus), 290)


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory) -> Path:
    """A folder with a tokenizer that has no pad token, and files of all kinds."""
    folder = tmp_path_factory.mktemp("made") / "model"
    config = read_config(SOURCE)
    write_model(config, numbered_weights(config), folder, "float32", SOURCE)
    write_json(folder / "config.json", SOURCE)
    tokenizer.save_pretrained(str(folder))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=3))
    (folder / "generation_config.json").write_text('{"eos_token_id": [0],   "top_p": 0.6}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}\r\n")
    (folder / "LICENSE").write_text("as it is")
    return folder


@pytest.fixture
def model(made, tmp_path) -> Path:
    """A copy of that folder to change."""
    return Path(shutil.copytree(made, tmp_path / "model"))


def without_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    return folder


def start(corpus: Path, run: Path, *options: str) -> Prepared:
    arguments = ["--data", str(corpus), "--run-dir", str(run), "--seq-len", "16", "--batch-size", "2"]
    arguments += ["--eval-samples", "4", "--sample-tokens", "0", *options]
    config = parse_args(arguments, "train.py", None, TrainConfig)
    with FolderLock(config.folder) as lock:
        return prepare(config, "JAX", lock)


def save_weights(run: Path) -> None:
    """A checkpoint, as training would write it, of the weights that the run began with."""
    config = TrainConfig.from_dict(read_json(run / "train_config.json"))
    writer = CheckpointWriter(run)
    writer.save_weights(numbered_weights(config.model))
    writer.close()


# tokenizers


@pytest.mark.parametrize("said", KINDS)
def test_a_tokenizer_that_is_not_read_is_never_replaced(said, model, corpus, tmp_path, capsys):
    without_tokenizer(model)
    for name in KINDS[said]:
        (model / name).write_text("{}")
    with pytest.raises(UserError, match=r"train with --tokenizer FOLDER, one with a tokenizer\.json") as refused:
        start(corpus, tmp_path / "run", "--init", str(model))
    assert said in str(refused.value)
    assert not (tmp_path / "run" / "train_config.json").exists()
    import_run(model, tmp_path / "converted")
    with pytest.raises(UserError, match=r"train with --tokenizer FOLDER, one with a tokenizer\.json"):
        start(corpus, tmp_path / "converted")
    assert "Training a tokenizer" not in capsys.readouterr().out


def test_weights_without_any_tokenizer_do_not_get_a_new_one(model, corpus, tmp_path):
    without_tokenizer(model)
    for run, options in (("new", ["--init", str(model)]), ("converted", [])):
        if not options:
            import_run(model, tmp_path / run)
        with pytest.raises(UserError, match=r"holds no tokenizer\.json: train with --tokenizer FOLDER"):
            start(corpus, tmp_path / run, *options)


def test_another_tokenizer_is_taken_byte_for_byte(made, model, corpus, tmp_path, capsys):
    for name in ("tokenizer_config.json", "tiktoken.model", "tokenization_moonshot.py"):
        without_tokenizer(model).joinpath(name).write_text("{}")
    import_run(model, tmp_path / "converted")
    for run, options in (("new", ["--init", str(model)]), ("converted", [])):
        prepared = start(corpus, tmp_path / run, "--tokenizer", str(made), *options)
        assert prepared.tokenizer.pad_token is None
        save_weights(tmp_path / run) if options else None
        export_run(tmp_path / run, tmp_path / f"{run}-out")
        names = {path.name for path in (tmp_path / f"{run}-out").iterdir()}
        assert "tiktoken.model" not in names
        for name in ("tokenizer.json", "tokenizer_config.json", "additional_chat_templates/rag.jinja"):
            assert (tmp_path / f"{run}-out" / name).read_bytes() == (made / name).read_bytes()
    assert f"The tokenizer is that of {made}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "LlamaTokenizer", None])
def test_a_vocabulary_and_its_merges_are_read_where_the_class_is_named(kind, tokenizer, model, corpus, tmp_path):
    without_tokenizer(model)
    tokenizer.backend_tokenizer.model.save(str(model))
    named = {} if kind is None else {"tokenizer_class": kind}
    write_json(model / "tokenizer_config.json", named | {"eos_token": "<|endoftext|>"})
    if kind in (None, "LlamaTokenizer"):
        with pytest.raises(UserError, match=f"tokenizer_class is {kind!r} in tokenizer_config.json: with vocab.json"):
            load_tokenizer(str(model))
        return
    read = load_tokenizer(str(model))
    for text in ("def f(x):\n    return x + 1\n", "function_3_7 wörld 😀\t\r\n", "return"):
        ids = read(text, add_special_tokens=False)["input_ids"]
        assert read.decode(ids) == text
        if kind != "Qwen2Tokenizer":  # which splits text otherwise
            assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    start(corpus, tmp_path / "run", "--init", str(model))
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "run" / "tokenizer" / name).read_bytes() == (model / name).read_bytes()


# the files


def test_files_travel_through_training_byte_for_byte(made, corpus, tmp_path, capsys):
    prepared = start(corpus, tmp_path / "run", "--init", str(made))
    assert prepared.config.model == read_config(SOURCE)  # no pad token is added
    assert prepared.tokenizer.pad_token is None
    save_weights(tmp_path / "run")
    write_json(tmp_path / "run" / "source_dtypes.json", {"dtype": "float32", "others": {}})
    export_run(tmp_path / "run", tmp_path / "out")
    for file in made.rglob("*"):
        name = file.relative_to(made).as_posix()
        if file.is_file() and name != "config.json":
            assert (tmp_path / "out" / name).read_bytes() == file.read_bytes(), name
    said = capsys.readouterr().out
    assert "config.json is copied from the source, except: " in said
    assert "End of a text" not in said


@pytest.mark.parametrize("named", [{"AutoTokenizer": ["own.Slow", None]}, ["own.Slow", None], {"AutoConfig": "own.C"}])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_card_says_how_the_export_is_loaded_and_rounded(named, dtype, model, tmp_path):
    without_tokenizer(model)
    write_json(model / "tokenizer_config.json", {"auto_map": named})
    import_run(model, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out", dtype=dtype)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ('AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)' in card) == ("AutoConfig" not in named)
    assert 'AutoModelForCausalLM.from_pretrained("FOLDER")' in card
    assert ("bit for bit in float32" in card) == (dtype is None)
    # the correction biases are float32
    assert ("in bfloat16 and float32, to which their float32 values are rounded" in card) == (dtype == "bfloat16")


@pytest.mark.parametrize(
    ("config", "generation", "exported", "generated"),
    [(0, 0, 0, 0), (0, [0, 5], 0, [0, 5]), ([0, 5], 0, [0, 5], [0, 5]), (7, 7, 0, 0), (0, 7, 0, 0), (0, None, 0, 0)],
)
def test_end_tokens_agree_or_the_difference_is_said(
    config, generation, exported, generated, model, corpus, tmp_path, capsys
):
    write_json(model / "config.json", SOURCE | {"eos_token_id": config})
    write_json(model / "generation_config.json", {"eos_token_id": generation, "top_p": 0.6})
    start(corpus, tmp_path / "run", "--init", str(model))
    said = capsys.readouterr().out
    assert ("End of a text: in training the token 0" in said) == (config != 0 or generation not in (0, None))
    save_weights(tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["eos_token_id"] == exported
    assert read_json(tmp_path / "out" / "generation_config.json") == {"eos_token_id": generated, "top_p": 0.6}
    if generated != generation:
        assert "generation_config.json is copied from the source, except: eos_token_id is" in capsys.readouterr().out


def test_links_that_lead_elsewhere_and_large_files_are_named_and_not_kept(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "secret").write_text("secret")
    (model / "notes.txt").symlink_to(tmp_path / "secret")
    (model / "inside.txt").symlink_to(model / "LICENSE")
    (model / "large.txt").write_bytes(b"x" * 100_000)
    (model / "adapter.safetensors").write_bytes(b"weights")
    os.mkfifo(model / "pipe")
    monkeypatch.setattr("jaxllm.store.source.MAX_BYTES", 90_000)
    found = source_files(model)
    assert sorted(found.left_out) == ["large.txt", "notes.txt", "pipe"]
    assert "source/inside.txt" in found.places
    assert not [name for name in found.places if name.endswith(".safetensors")]
    found.write(tmp_path)
    assert "large.txt, notes.txt, pipe" in capsys.readouterr().err
    assert (tmp_path / "source" / "inside.txt").read_bytes() == (model / "LICENSE").read_bytes()


# where it is


@pytest.fixture
def hub_model(model, tmp_path, monkeypatch) -> str:
    """The folder as the Hub's cache has it: links to blobs."""
    cache = tmp_path / "hub" / "models--someone--model"
    snapshot = cache / "snapshots" / ("0" * 40)
    for i, file in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        (cache / "blobs").mkdir(exist_ok=True)
        shutil.move(file, cache / "blobs" / str(i))
        link.symlink_to(cache / "blobs" / str(i))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return "someone/model"


def test_a_hub_name_is_read_from_the_cache(hub_model, made, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_same_bits(read_folder(hub_model)[1], read_folder(made)[1])
    import_run(hub_model, "converted")
    prepared = start(corpus, tmp_path / "run", "--init", hub_model)
    assert prepared.config.model == read_config(SOURCE)
    for run in ("converted", "run"):
        for name in ("tokenizer/tokenizer.json", "tokenizer/additional_chat_templates/rag.jinja", "source/LICENSE"):
            assert (tmp_path / run / name).read_bytes() == (
                made / Path(name).relative_to(name.split("/")[0])
            ).read_bytes()


@pytest.mark.parametrize("name", ["nobody/nothing", "not a name/at all"])
def test_a_name_that_is_not_in_the_cache_is_refused(name, hub_model, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for read in (
        read_folder,
        lambda path: import_run(path, "run"),
        lambda path: start(corpus, Path("r"), "--init", path),
    ):
        with pytest.raises(UserError, match=f"'{name}' is not a folder, and the Hub's cache does not hold"):
            read(name)


# killed at the start


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_from_the_weights(made, corpus, tmp_path):
    run = tmp_path / "run"
    start(corpus, run, "--init", str(made))
    config: Any = parse_args(["--run-dir", str(run)], "train.py", None, TrainConfig)  # without --init
    assert config.init == made
    found = train.read_start(config, None)
    assert found is not None
    assert_same_bits(tuple(found.weights), tuple(numbered_weights(read_config(SOURCE))))
    for part in ("source", "tokenizer"):  # killed while they were copied
        shutil.rmtree(run / part)
        assert start(corpus, run).resumes
        for name in ("tokenizer/tokenizer_config.json", "source/generation_config.json"):
            assert (run / name).read_bytes() == (made / Path(name).name).read_bytes()
    save_weights(run)
    assert train.read_start(config, None) is None


def test_values_of_weights_are_in_the_dtype_of_the_source(model, corpus, tmp_path):
    config = read_config(SOURCE)
    shutil.rmtree(model / "config.json", ignore_errors=True)
    (model / "model.safetensors").unlink()
    write_model(config, numbered_weights(config), tmp_path / "half", "float16", SOURCE)
    shutil.copy(tmp_path / "half" / "model.safetensors", model)
    write_json(model / "config.json", {key: value for key, value in SOURCE.items() if key != "torch_dtype"})
    found = train.read_start(
        TrainConfig.from_options(init=model, model=config, seq_len=16, run_dir=tmp_path / "run"), None
    )
    assert found is not None
    assert found.dtypes["dtype"] == "float16"
    assert set(found.dtypes["others"].values()) == {"float32"}  # of the correction biases
    assert all(np.isfinite(leaf).all() for leaf in found.weights.params["token_embeddings"].values())
