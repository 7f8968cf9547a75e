"""The ladder holds in every precision, and each planted fault is caught by the lowest rung that can see it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import parity_tests.ladder
from jaxllm.config import PRESETS, ModelConfig, RouterConfig
from parity_tests.__main__ import main
from parity_tests.compare import TOLERANCES, compare_arrays, compare_leaves, expert_flips
from parity_tests.forward import random_weights, torch_model
from parity_tests.ladder import Ladder
from parity_tests.mutations import MUTATIONS, FaultyAdamW
from parity_tests.options import RUNGS
from parity_tests.text import read_tokens

TINY = PRESETS["tiny"]
# for tests with many models: the same parts, smaller
NARROW = dataclasses.replace(TINY, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, moe_intermediate_size=48)
# not covered by tiny: several shared experts, larger latents, no final norm
OTHER = dataclasses.replace(
    NARROW, n_shared_experts=2, n_routed_experts=5, num_experts_per_tok=3, compression_ratio=2, final_norm=False
)
FORWARD = ("weights", "layers", "logits", "loss")


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return read_tokens(TINY, Ladder.tokens_needed(TINY, 500, 50), None, None)


def failures(ladder: Ladder, model, rungs=RUNGS) -> list[str]:
    return [
        f"{row.rung}: {row.what} of {row.leaf}, {row.relative_l2} ({row.note})"
        for _, rows in ladder.climb(model, rungs)
        for row in rows
        if not row.passed
    ]


def ladder_of(config: ModelConfig, tokens: np.ndarray, precision: str, **options):
    config = dataclasses.replace(config, dropout=0.0)
    weights = random_weights(config)
    return Ladder(config, weights, tokens, precision, **options), torch_model(config, weights, precision)


@pytest.fixture(scope="module")
def narrow(tokens):
    return ladder_of(NARROW, tokens, "float32", seq_len=200, steps=15)


@pytest.mark.slow  # `.ci/run` runs the whole ladder on a trained run of `tiny`
def test_tiny_in_float32(tokens):
    ladder, model = ladder_of(TINY, tokens, "float32")
    assert failures(ladder, model) == []
    assert len(ladder.curve.jax) == len(ladder.curve.torch) == 50
    assert ladder.curve.jax[-1] < ladder.curve.jax[0] - 1  # training reduced the loss


def test_float64_agrees_to_its_precision(tokens):
    assert failures(*ladder_of(NARROW, tokens, "float64", seq_len=200, steps=15)) == []


@pytest.mark.slow
def test_bfloat16(tokens):
    assert failures(*ladder_of(NARROW, tokens, "bfloat16", seq_len=200, steps=8)) == []


@pytest.mark.parametrize("rungs", [FORWARD, pytest.param(RUNGS[4:6], marks=pytest.mark.slow)], ids="_".join)
def test_other_shapes(tokens, rungs):
    assert failures(*ladder_of(OTHER, tokens, "float64", seq_len=200, steps=5), rungs=rungs) == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_tiny_in_other_precisions(tokens, precision):
    assert failures(*ladder_of(TINY, tokens, precision)) == []


@pytest.fixture(scope="module")
def narrow_muon(tokens):
    return ladder_of(NARROW, tokens, "float32", seq_len=200, steps=15, optimizer="muon")


@pytest.mark.slow  # test_deepseek.py compares Muon in float64
def test_muon_in_float64(tokens):
    ladder = ladder_of(NARROW, tokens, "float64", seq_len=200, steps=15, optimizer="muon")
    assert failures(*ladder, rungs=("step", "trajectory")) == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_muon_in_other_precisions(tokens, precision):
    ladder = ladder_of(NARROW, tokens, precision, seq_len=200, steps=5, optimizer="muon")
    assert failures(*ladder, rungs=("step", "trajectory")) == []


SLOW = {"cosine_with_a_floor"}  # what rounding amplifies is trained too; `gradients_not_zeroed` shows it


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MUTATIONS]
)
def test_a_planted_fault_is_caught_by_the_lowest_rung_that_can_see_it(request, name):
    mutation = MUTATIONS[name]
    ladder, model = request.getfixturevalue("narrow_muon" if mutation.optimizer == "muon" else "narrow")
    with mutation.plant(model):
        breaches = (row for _, rows in ladder.climb(model) for row in rows if not row.passed)
        caught = next(breaches, None)
    assert caught is not None, "nothing was caught"
    assert (caught.rung, caught.what) == (mutation.rung, mutation.what)
    # the fault is removed again, so that the next one is tested alone
    assert failures(ladder, model, FORWARD) == []


def test_faulty_adamw_without_a_mistake_is_adamw(narrow, monkeypatch):
    """Its mutations must be caught for their mistake, not because the optimizer is a different one."""
    monkeypatch.setattr(torch.optim, "AdamW", FaultyAdamW)
    assert failures(*narrow, rungs=("step",)) == []


def test_there_is_a_fault_for_every_rung():
    assert {mutation.rung for mutation in MUTATIONS.values()} == set(RUNGS)


def test_near_ties_are_distinguished_from_wrong_choices():
    scores = np.asarray([[0.9, 0.5, 0.5 - 1e-7, 0.1]])
    none, router = np.zeros(4), RouterConfig()
    assert expert_flips(scores, none, np.asarray([[1, 0]]), router).count == 0
    tie = expert_flips(scores, none, np.asarray([[0, 2]]), router)
    assert tie.count == 1
    assert tie.margin == pytest.approx(1e-7)
    assert expert_flips(scores, none, np.asarray([[0, 3]]), router).margin == pytest.approx(0.4)
    # the best expert is missing: a tie between the two worst is no excuse
    assert expert_flips(scores, none, np.asarray([[1, 2]]), router).margin == pytest.approx(0.4)
    # the bias decides the choice
    assert expert_flips(scores, np.asarray([0, 0, 0, 0.45]), np.asarray([[0, 3]]), router).count == 0


@pytest.mark.parametrize(
    ("training", "wrong"),
    [
        pytest.param(("gradients",), {"gradients"}, marks=pytest.mark.slow),
        (("step", "trajectory"), {"first moments", "second moments", "update"}),  # they share a program
    ],
)
def test_a_near_tie_is_replayed_and_reported(tokens, training, wrong):
    """If rounding changes a choice, the replay shows that nothing else differs."""
    config = NARROW
    weights = random_weights(config)
    router = weights.params["decoder_layers"]["mlp"]["router"]["weight"]  # (L,D,E)
    bias = weights.routing_bias["decoder_layers"]["mlp"]["routing_bias"]
    # in every layer, two experts are a near tie for the second place
    router[..., 1], bias[...] = router[..., 0], [1, 1 - 1e-6, 2, 0, 0, 0, 0]
    model = torch_model(config, weights)
    for layer in model.decoder_layers:
        layer.mlp.routing_bias[1] += 2e-6  # PyTorch prefers the second of the two, Flax the first
    ladder = Ladder(config, weights, tokens, "float32", seq_len=200, steps=5)
    found = dict(ladder.climb(model, ("layers", "logits", "loss", *training)))
    assert [row for rows in found.values() for row in rows if not row.passed] == []
    choice = next(row for row in found["layers"] if row.what == "expert choice")
    assert "near ties" in choice.note
    assert 0 < choice.max_error < TOLERANCES["float32"].near_tie
    for rung in training:
        assert found[rung][0].what == "expert choice"
    assert ladder.curve.replayed == ("trajectory" in training)
    # the replay hides no fault
    with MUTATIONS["gates_detached"].plant(model):
        (_, rows), *_ = ladder.climb(model, training[:1])
    assert {row.what for row in rows if not row.passed} == wrong


@pytest.mark.slow
def test_what_training_amplifies_is_distinguished_from_a_fault(narrow, monkeypatch):
    """Where rounding grows beyond the tolerance, two correct programs may differ by what rounding does, not by more."""
    ladder, model = narrow
    strict = ladder.tolerances.trajectory._replace(relative_l2=2e-7)  # as if this calm training were a wild one
    monkeypatch.setattr(ladder, "tolerances", ladder.tolerances._replace(trajectory=strict))
    ((_, rows),) = ladder.climb(model, ("trajectory",))
    assert [row for row in rows if not row.passed] == []
    parameters = [row for row in rows if row.what == "parameters"]
    assert max(row.relative_l2 for row in parameters) > strict.relative_l2
    assert all(row.tolerance.endswith("amplified") for row in parameters)
    assert any("10 roundings" in row.note for row in rows)
    with MUTATIONS["cosine_with_a_floor"].plant(model):
        assert any("losses" in failure for failure in failures(ladder, model, ("trajectory",)))
    monkeypatch.setattr(parity_tests.ladder, "MAX_AMPLIFIED", strict.relative_l2)  # too wild to be compared
    assert failures(ladder, model, ("trajectory",)) != []


def test_a_cancelled_gradient_is_distinguished_from_a_wrong_one(tokens):
    """With nearly equal values everywhere, the gradient of a query is a small difference of large terms."""
    weights = random_weights(NARROW)
    for name in ("token_embeddings", "position_embeddings"):
        table = weights.params[name]["weight"]  # (V|P,D)
        table[:] = table[0] + 0.03 * table
    ladder, model = Ladder(NARROW, weights, tokens, "float32", seq_len=200, steps=15), torch_model(NARROW, weights)
    (_, rows), *_ = ladder.climb(model, ("gradients",))
    assert [row for row in rows if not row.passed] == []
    limit = TOLERANCES["float32"].gradient.relative_l2
    excused = {row.leaf: row.note for row in rows if row.what == "gradients" and row.relative_l2 > limit}
    assert set(excused.values()) == {"at most 1e-09 of all leaves together"}
    assert "decoder_layers.0.self_attn.q_proj_u.weight" in excused
    with MUTATIONS["scale_missing"].plant(model):
        (_, rows), *_ = ladder.climb(model, ("gradients",))
    assert excused.keys() <= {row.leaf for row in rows if not row.passed}


@pytest.mark.slow
def test_two_layers_at_full_width(tokens):
    config = dataclasses.replace(PRESETS["customllm-1b"], num_hidden_layers=2)
    assert failures(*ladder_of(config, tokens, "float32"), rungs=FORWARD) == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_two_layers_at_full_width_train(tokens, precision):
    config = dataclasses.replace(PRESETS["customllm-1b"], num_hidden_layers=2)
    assert failures(*ladder_of(config, tokens, precision)) == []


@pytest.mark.slow
def test_the_whole_customllm_1b(tokens):
    assert failures(*ladder_of(PRESETS["customllm-1b"], tokens, "float32"), rungs=FORWARD) == []


def test_nan_never_passes():
    values, tolerance = np.arange(3.0), TOLERANCES["float32"].forward
    assert compare_arrays("", "", "", values, values, tolerance).passed
    assert not compare_arrays("", "", "", values, np.full((3,), np.nan), tolerance).passed
    assert not compare_arrays("", "", "", np.full((3,), np.nan), np.full((3,), np.nan), tolerance).passed


def test_an_infinite_gradient_excuses_nothing():
    theirs = {"a": np.zeros(1), "b": np.full(1, 2.0)}
    rows = compare_leaves("", "", {"a": np.full(1, np.inf), "b": np.ones(1)}, theirs, TOLERANCES["float32"].gradient)
    assert not any(row.passed for row in rows)


def test_the_command_reports_a_planted_fault(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a short text, repeated as often as necessary\n" * 40)
    arguments = ["--rungs", "weights", "layers", "--text", str(text), "--out", str(tmp_path / "out"), "--seq-len", "60"]
    assert main(arguments) == 0
    assert "The two frameworks agree." in capsys.readouterr().out
    assert main([*arguments, "--mutate", "rope_halves_swapped"]) == 1
    assert "BREACH, first in: attention of layer 0 (rung layers)" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert report["passed"] is False
    assert report["first_divergence"] == "attention of layer 0 (rung layers)"
    assert {"max_error", "relative_l2", "cosine", "leaf", "tolerance", "passed"} <= report["rows"][0].keys()
    assert (tmp_path / "out" / "parity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--mutate", "everything"], "mutate is 'everything': choose one of weight_transposed"),
        (["--text", "nowhere.txt"], "text is 'nowhere.txt'"),
        (["--seq-len", "1"], "seq_len is 1"),
        (["--steps", "2"], "steps is 2: it must be at least 5"),
        (["--seed", "-1"], "seed is -1"),
        (["--text", __file__.removesuffix(".py")], "text is"),
        (["nowhere"], "'nowhere' is neither a run folder nor an exported model"),
    ],
)
def test_bad_input_is_refused_in_one_line(options, part, capsys, tmp_path):
    assert main([*options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
