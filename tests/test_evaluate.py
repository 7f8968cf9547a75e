"""python -m jaxllm.evaluate: every token scored once, with the numbers of the plain forward pass."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from jaxllm import evaluate, load_model
from jaxllm.data.tokenizer import load_tokenizer


def printed(out: str) -> dict[str, float]:
    rows = [line.split("  ", 1) for line in out.splitlines()]
    return {name: float(value.split()[0].replace(",", "")) for name, value in rows}


@pytest.mark.parametrize(
    ("seq_len", "batch_size"),
    [("16", "8"), pytest.param("64", "3", marks=pytest.mark.slow), pytest.param("2", "50", marks=pytest.mark.slow)],
)
def test_every_token_is_scored_once(seq_len, batch_size, run, tmp_path, capsys):
    text = "def f(x):\n    return x + 1\n\n日本 = f(2)\n" * 3
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    arguments = [str(run), "--data", str(tmp_path / "text.txt"), "--seq-len", seq_len, "--batch-size", batch_size]
    assert evaluate.main(arguments) == 0
    found = printed(capsys.readouterr().out)
    tokenizer, model = load_tokenizer(str(run / "tokenizer")), load_model(run)
    ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    nats, width = 0.0, int(seq_len) - 1
    forward = nnx.jit(lambda model, window: model(window))
    for start in range(0, len(ids) - 1, width):
        window = np.asarray([ids[start : start + width + 1]])
        log_probabilities = jax.nn.log_softmax(forward(model, window)[0, :-1])
        nats -= float(np.take_along_axis(np.asarray(log_probabilities), window[0, 1:, None], 1).sum())
    assert found["Tokens"] == len(ids) - 1
    assert found["Loss"] == pytest.approx(nats / (len(ids) - 1), abs=1e-4)
    assert found["Perplexity"] == pytest.approx(np.exp(nats / (len(ids) - 1)), rel=1e-3)
    assert found["Bits per byte"] == pytest.approx(nats / np.log(2) / len(text.encode()), abs=1e-3)


def test_the_default_is_what_the_run_holds_out(run, capsys):
    assert evaluate.main([str(run)]) == 0
    assert 3 < printed(capsys.readouterr().out)["Loss"] < 6


def test_bad_input_is_a_line(run, tmp_path, capsys):
    for options, said in (
        (["--data", str(tmp_path / "none.txt")], "data is "),
        (["--seq-len", "65"], "seq_len is 65: it must lie in 2 to max_position_embeddings = 64"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--data-split", "test"], "data_split is 'test': it needs --data"),
        (["--text-field", "body"], "text_field is 'body': it needs --data"),
        (["--text-field", "text"], "text_field is 'text': it needs --data"),  # the default
    ):
        assert evaluate.main([str(run), *options]) == 2
        assert capsys.readouterr().err.startswith(f"error: {said}")
