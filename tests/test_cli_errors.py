"""Bad input: exit code 2, one line that names the field and the value, and nothing is created or changed."""

from __future__ import annotations

import json
import shutil

import pytest

import train
from convert import __main__ as convert
from jaxllm import generate
from jaxllm.data import corpus as corpora
from jaxllm.data import tokenizer as tokenizers


@pytest.fixture
def refused(capsys, tmp_path):
    """Run a command that must fail, and return its one line."""

    def call(main, *args) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main([str(arg) for arg in args]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return call


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "huge"], "preset is 'huge': choose one of tiny"),
        (["--recipe", "cake"], "recipe is 'cake': choose one of default, seed"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--model.hidden-size", "33"], "hidden_size is 33"),
        (["--model.num-attention-heads", "5"], "multiple of num_attention_heads = 5"),
        (["--seq-len", "65"], "seq_len is 65: the position table has max_position_embeddings = 64 rows"),
        (["--model.num-experts-per-tok", "5"], "num_experts_per_tok is 5: it must be at most n_routed_experts = 4"),
        (["--model.vocab-size", "100"], "vocab_size is 100"),
        (["--data", "nowhere.txt"], "data is 'nowhere.txt': there is no such file"),
        (["--tokenizer", "./nowhere"], "tokenizer is './nowhere': there is no such folder"),
        (["--eval-samples", "0"], "eval_samples is 0"),
        (["--prompts", "word " * 100], "prompts has one of "),
    ],
)
def test_a_bad_option(refused, narrow, tmp_path, options, message):
    assert message in refused(train.main, *narrow, "--run-dir", tmp_path / "run", *options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "it is empty"),
        ("a.csv", "x", "the ending must be one of .txt"),
        ("a.txt", "short", "held-out part has 0 tokens"),
        ("a.jsonl", '{"body": "x"}\n', "has a text in the field 'text': pass --text-field"),
        ("a.parquet", "PAR1 or not", "a.parquet"),
    ],
)
def test_a_bad_data_file(refused, narrow, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    error = refused(train.main, *narrow, "--run-dir", tmp_path / "run", "--data", tmp_path / name)
    assert message in error
    assert "data" in error


def test_a_data_folder_without_text(refused, narrow, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.bin").write_bytes(b"x")
    error = refused(train.main, *narrow, "--run-dir", tmp_path / "run", "--data", tmp_path / "data")
    assert "the folder holds no file ending in" in error


def test_a_folder_that_holds_no_tokenizer(refused, narrow, corpus, tmp_path):
    error = refused(train.main, *narrow, "--run-dir", tmp_path / "run", "--tokenizer", corpus)
    assert "holds neither tokenizer.json nor tokenizer_config.json" in error


def test_a_broken_tokenizer(refused, narrow, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    error = refused(train.main, *narrow, "--run-dir", tmp_path / "run", "--tokenizer", tmp_path)
    assert "it could not be loaded" in error


def test_a_tokenizer_larger_than_the_vocabulary(refused, narrow, run, tmp_path):
    error = refused(
        train.main, *narrow, "--model.vocab-size", 299, "--run-dir", tmp_path / "run", "--tokenizer", run / "tokenizer"
    )
    assert "vocab_size is 299, but the tokenizer has 300 tokens" in error


def test_no_network(refused, run, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "hub_reachable", lambda: False)
    monkeypatch.setattr(tokenizers, "hub_reachable", lambda: False)
    error = refused(train.main, "--recipe", "seed", "--run-dir", tmp_path / "run")
    assert "'HuggingFaceTB/smollm-corpus', could not be reached" in error
    assert "pass --data FILE" in error
    error = refused(train.main, "--tokenizer", "jaxllm-tests/none", "--run-dir", tmp_path / "run")
    assert "tokenizer is 'jaxllm-tests/none'" in error
    assert "could not be reached" in error
    assert "pass --tokenizer FOLDER" in error


def test_an_option_that_tyro_cannot_parse(narrow, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        train.main([*narrow, "--run-dir", str(tmp_path / "run"), "--batch-size", "x"])
    assert exit_.value.code == 2
    assert not (tmp_path / "run").exists()


def test_generating_from_what_is_no_run(refused, tmp_path):
    assert "holds no config.json" in refused(generate.main, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "64"], "max_new_tokens is 64: with a prompt of "),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-p", "0"], "top_p is 0.0"),
        (["--top-k", "-1"], "top_k is -1"),
    ],
)
def test_generating_with_a_bad_option(refused, run, options, message):
    assert message in refused(generate.main, run, "--prompt", "def ", *options)


def test_a_truncated_checkpoint(refused, narrow, run, tmp_path):
    broken = shutil.copytree(run, tmp_path / "run")
    for file in (broken / "checkpoints" / "20").rglob("*"):
        if file.is_file() and file.stat().st_size > 2000:
            file.write_bytes(file.read_bytes()[:1000])
    for main, args in (
        (generate.main, [broken]),
        (train.main, [*narrow, "--steps", 21, "--run-dir", broken]),
        (convert.main, ["to-torch", broken, tmp_path / "out"]),
    ):
        assert "checkpoints/20 cannot be read" in refused(main, *args)


def test_a_run_without_checkpoints(refused, run, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "config.json", tmp_path / "run")
    assert "holds no complete checkpoint" in refused(convert.main, "to-torch", tmp_path / "run", tmp_path / "out")


def test_converting_what_is_no_run(refused, tmp_path):
    assert "holds no config.json" in refused(convert.main, "to-torch", tmp_path, tmp_path / "out")


def test_a_config_that_is_not_valid(refused, run, tmp_path):
    config = json.loads((run / "config.json").read_text()) | {"num_experts_per_tok": 9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "num_experts_per_tok is 9" in refused(generate.main, tmp_path)
