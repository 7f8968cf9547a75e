"""Bad input: one line that names the field and the value, exit code 2, and nothing made or destroyed."""

from __future__ import annotations

import pytest

import train
from convert import __main__ as convert
from jaxllm import generate as generation
from jaxllm.data import sources as corpora
from jaxllm.data import tokenizer as tokenizers


def refused(main, arguments: list[str], capsys, *parts: str) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    for part in parts:
        assert part in error, error


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--preset", "huge"], ["preset is 'huge'", "customllm-1b"]),
        (["--recipe", "secret"], ["recipe is 'secret'"]),
        (["--model.hidden-size", "100"], ["hidden_size is 100", "num_attention_heads"]),
        (["--seq-len", "4096"], ["seq_len is 4096", "max_position_embeddings"]),
        (["--model.num-experts-per-tok", "8"], ["num_experts_per_tok is 8", "n_routed_experts = 7"]),
        (["--steps", "0"], ["steps is 0"]),
        (["--peak-tflops", "0"], ["peak_tflops is 0", "larger than 0"]),
        (["--data", "no/such/file.txt"], ["data is 'no/such/file.txt'"]),
        (["--data", "nothing.parquet"], ["data is 'nothing.parquet'"]),
        (["--tokenizer", "./nowhere"], ["tokenizer is './nowhere'"]),
        (["--model.vocab-size", "100"], ["vocab_size is 100"]),
    ],
)
def test_bad_options(options, parts, corpus, tmp_path, capsys):
    data = [] if "--data" in options else ["--data", str(corpus)]
    refused(train.main, [*options, *data, "--run-dir", str(tmp_path / "run")], capsys, *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("empty.txt", b"", "it is empty"),
        ("image.png", b"\x89PNG", "the ending is none of"),
        ("rows.jsonl", b'{"body": "x"}\n', "--text-field"),
        ("rows.parquet", b"no parquet", "not a parquet file"),
        ("short.txt", b"just a few words", "two rows or files"),
    ],
)
def test_bad_data_files(name, content, part, tmp_path, capsys):
    file = tmp_path / name
    file.write_bytes(content)
    refused(train.main, ["--data", str(file), "--run-dir", str(tmp_path / "run")], capsys, part)
    assert not (tmp_path / "run").exists()


def test_without_a_network_the_error_names_the_hub_and_the_alternatives(tmp_path, capsys, monkeypatch):
    for module in (corpora, tokenizers):
        monkeypatch.setattr(module, "hub_reachable", lambda: False)
    arguments = ["--preset", "customllm-1b", "--recipe", "seed", "--run-dir", str(tmp_path / "run")]
    refused(train.main, arguments, capsys, "HuggingFaceTB/smollm-corpus", "could not be reached", "--data FILE")
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_does_not_fit(run, corpus, tmp_path, capsys):
    arguments = ["--model.vocab-size", "200", "--tokenizer", str(run / "tokenizer"), "--data", str(corpus)]
    refused(train.main, [*arguments, "--run-dir", str(tmp_path / "run")], capsys, "vocab_size is 200", "300 tokens")


def test_options_of_the_wrong_type_end_with_the_same_code():
    with pytest.raises(SystemExit) as end:
        train.main(["--batch-size", "many"])
    assert end.value.code == 2


def test_generate_and_convert_refuse_a_folder_that_is_no_run(run, tmp_path, capsys):
    refused(generation.main, [str(tmp_path)], capsys, "holds no config.json")
    refused(convert.main, ["to-torch", str(tmp_path), str(tmp_path / "out")], capsys, "holds no config.json")
    refused(convert.main, ["to-flax", str(tmp_path / "x.bin"), str(tmp_path / "out")], capsys)
    refused(generation.main, [str(run), "--max-new-tokens", "500"], capsys, "max_new_tokens is 500", "64 rows")
    refused(generation.main, [str(run), "--top-p", "1.5"], capsys, "top_p is 1.5")
    assert list(tmp_path.iterdir()) == []
