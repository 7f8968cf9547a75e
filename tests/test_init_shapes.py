"""--init keeps the model of the weights: options that change their shapes are refused before anything slow."""

from __future__ import annotations

from pathlib import Path

import pytest

import train
from convert import __main__ as convert
from jaxllm.run import run as running


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert convert.main(["to-torch", str(run), str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["hidden-size", "64"], ["model.hidden_size is 64, and the weights have 32"]),
        (["vocab-size", "301"], ["model.vocab_size is 301, and the weights have 300"]),
        (["num-hidden-layers", "3"], ["model.num_hidden_layers is 3"]),
        (["n-routed-experts", "6"], ["model.n_routed_experts is 6"]),
        (["n-shared-experts", "2"], ["model.n_shared_experts is 2"]),
        (["max-position-embeddings", "128"], ["model.max_position_embeddings is 128"]),
        (["num-attention-heads", "4"], ["model.num_attention_heads is 4"]),
        (["compression-ratio", "2"], ["model.compression_ratio is 2"]),
        (["no-lm-head-bias", "--model.hidden-size", "64"], ["model.hidden_size is 64", "model.lm_head_bias is False"]),
    ],
    ids=lambda value: value[0] if value[0][0].islower() else "",
)
def test_an_option_that_changes_the_shapes_of_trained_weights_is_named(
    options, said, exported, corpus, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(running, "prepare", None)
    option, *rest = options
    arguments = ["--init", str(exported), "--data", str(corpus), "--seq-len", "16", f"--model.{option}", *rest]
    assert train.main([*arguments, "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(part in error for part in [*said, f"--init gives the model of {exported}"]), error
    assert "num_experts_per_tok" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_of_trained_weights_is_not_told_to_change_their_table(
    exported, run, narrow_model, corpus, tmp_path, capsys
):
    """Their tokenizer is larger than the table: of --init, and of a folder that the converter made."""
    large = tmp_path / "large"
    options = ["--data", str(corpus), "--steps", "1", "--sample-tokens", "0"]
    bigger = ["--model.vocab-size", "310", "--run-dir", str(large), *options]
    assert train.main([*narrow_model, *bigger]) == 0
    capsys.readouterr()
    tokenizer = ["--seq-len", "16", "--tokenizer", str(large / "tokenizer"), *options]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (exported / name).rename(tmp_path / name)
    assert convert.main(["to-flax", str(exported), str(tmp_path / "converted")]) == 0
    for start in (
        ["--init", str(exported), "--run-dir", str(tmp_path / "new")],
        ["--run-dir", str(tmp_path / "converted")],
    ):
        assert train.main([*start, *tokenizer]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "vocab_size is 300, but the tokenizer has 310 tokens: pass the --tokenizer that belongs" in error
        assert "--model" not in error
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).rename(exported / name)
