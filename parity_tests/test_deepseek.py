"""The DeepSeek family against transformers' own models: the ladder on small models, planted faults, one run in two
frameworks. `python -m parity_tests FOLDER` is the same on any folder."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import train
from convert.__main__ import main as convert
from convert.mapping import PARAMS, ROUTING_BIAS, entries
from jaxllm.config.families import is_interleaved, read_config
from jaxllm.data.tokenizer import decode_after, encode_prompt, load_tokenizer
from jaxllm.generate import load_model
from jaxllm.model.decoding import generate
from jaxllm.store.checkpoint import Weights
from jaxllm.store.metrics_file import read_metrics
from jaxllm.train.optim import OptimizerState
from parity_tests import hf_side
from parity_tests.compare import Row
from parity_tests.deepseek_cases import CASES, V3, Json, respelled, yarn
from parity_tests.forward import random_weights, torch_model
from parity_tests.hf_mutations import STOCK_MUTATIONS
from parity_tests.ladder import Ladder
from parity_tests.options import RUNGS
from parity_tests.replay import Flips, expert_flips
from parity_tests.settings import SMALL, Settings, make_plan, text_batches
from parity_tests.training import JaxTraining, torch_train

TOKENS = np.random.default_rng(0).integers(0, 97, 90 + 50 * 2 * 2 * 64)
QUICK = ("v3-halves", "kimi-yarn", "v2", "v2-attention-bias", "glm", "youtu")
"""Cases that have each option of the mathematics at least once; the slow test runs all."""

LENGTH = 90
"""Position 0 sees no fault of the attention, and few tokens see few of the router's."""


def climb(case: Json, precision: str, *rungs: str, steps: int = 5, optimizer: str = "adamw") -> list[Row]:
    config = read_config(case)
    weights = random_weights(config)
    settings = Settings(LENGTH, steps, optimizer, sizes=SMALL, widens=False)  # test_parity.py goes beyond thresholds
    ladder = Ladder(config, weights, TOKENS, precision, settings, is_interleaved(case))
    model = torch_model(config, weights, precision, case)
    return [row for _, rows in ladder.climb(model, rungs) for row in rows]


def assert_passed(rows: list[Row]) -> None:
    assert rows
    assert not [row for row in rows if not row.passed]


# float64, lifted: beyond rounding is another formula; expected 2e-15
@pytest.mark.parametrize("case", [CASES[name] for name in QUICK], ids=QUICK)
def test_weights_and_logits_are_transformers_s(case):
    rows = climb(case, "float64", "weights", "logits", "loss")
    assert_passed(rows)
    assert max(row.relative_l2 or 0 for row in rows) < 1e-12


@pytest.mark.parametrize("name", ["v3-yarn", "v2-lite", "moonlight", "v3"])
def test_both_spellings_of_rotary_parameters_are_one_model(name):
    assert read_config(respelled(CASES[name])) == read_config(CASES[name])


@pytest.mark.slow  # the spellings give one config, as the test above shows
def test_the_other_spelling_s_logits_are_transformers_s():
    assert_passed(climb(respelled(CASES["v3-yarn"]), "float64", "weights", "logits"))


@pytest.mark.slow
def test_training_and_cached_decoding_are_transformers_s():
    assert_passed(climb(CASES["v3-yarn"], "float64", "gradients", "step", "trajectory", "generation"))


@pytest.mark.parametrize("rungs", [("step",), pytest.param(("gradients", "trajectory"), marks=pytest.mark.slow)])
def test_muon_updates_each_matrix_that_transformers_joins(rungs):
    assert_passed(climb(CASES["v3-yarn"], "float64", *rungs, optimizer="muon"))


def test_bfloat16_with_replayed_experts_is_transformers_s():
    assert_passed(climb(CASES["v2-lite"], "bfloat16", "layers", "logits", "loss", "generation"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_whole_ladder_on_every_case(case, precision):
    assert_passed(climb(case, precision, *RUNGS, steps=50))


# planted faults

FAULTY: dict[str, Json] = {
    "v3": V3 | yarn(1.0) | {"rms_norm_eps": 1e-2},  # so large that the norms on latents are seen to have another
    "v2": CASES["v2"],
}


@functools.cache
def faulty_side(kind: str) -> tuple[Ladder, torch.nn.Module]:
    config = read_config(FAULTY[kind])
    weights = random_weights(config)
    return Ladder(config, weights, TOKENS, "float64", Settings(LENGTH)), torch_model(
        config, weights, "float64", FAULTY[kind]
    )


@pytest.mark.parametrize("name", STOCK_MUTATIONS)
def test_a_planted_fault_is_caught_by_the_first_part_that_it_changes(name):
    known = STOCK_MUTATIONS[name]
    kind = next(kind for kind, case in FAULTY.items() if known.applies(read_config(case)))
    ladder, model = faulty_side(kind)
    with known.mutation.plant(model):
        rows = [row for _, found in ladder.climb(model, ["weights", "layers"]) for row in found]
    failed = [row for row in rows if not row.passed]
    assert failed
    assert failed[0].rung == known.mutation.rung
    assert failed[0].what == known.mutation.what
    untouched = [row for _, found in ladder.climb(model, ["layers"]) for row in found]
    assert_passed(untouched)


def test_near_ties_of_groups_have_their_margin():
    router = read_config(V3).router
    scores = np.full((1, 16), 0.1)
    scores[0, [0, 1]], scores[0, [4, 5]], scores[0, [8, 9]] = (0.9, (0.5, 0.6), (0.5, 0.6 - 2e-4))  # of groups 0 to 2
    bias = np.zeros(16)
    ours = np.array([[0, 1, 4, 5]])
    assert expert_flips(scores, bias, ours, router) == Flips(0, 0, 0.0)
    flips = expert_flips(scores, bias, np.array([[0, 1, 8, 9]]), router)
    assert (flips.count, flips.groups) == (1, 1)
    np.testing.assert_allclose(flips.margin, 1e-4)  # of the mean of a group's two best
    wrong = expert_flips(scores, bias, np.array([[0, 1, 12, 13]]), router)
    assert wrong.margin > 0.4
    in_group = expert_flips(scores, bias, np.array([[0, 1, 4, 6]]), router)
    assert (in_group.count, in_group.groups) == (1, 0)
    np.testing.assert_allclose(in_group.margin, 0.5)


# training in two frameworks


@pytest.mark.slow
def test_steps_here_and_there_are_steps_here():
    """Twenty steps here and twenty in PyTorch on transformers' model are forty here: weights, moments and bias."""
    case, half = CASES["v3"], 20
    config = read_config(case)
    plan = make_plan(config, "float64", Settings(steps=2 * half))
    training, weights = plan.config, random_weights(config)
    batches = text_batches(TOKENS, plan.sizes, 2 * half, plan.config.data)
    ours = JaxTraining(training, weights, "float64")
    whole, first = ours.train(batches), ours.train(batches[:half])

    def tree_of(named: dict[str, np.ndarray], like: Weights) -> Weights:
        trees = jax.tree.map(np.zeros_like, {PARAMS: like.params, ROUTING_BIAS: like.routing_bias})
        trees = jax.tree.map(lambda leaf: leaf.astype(np.float64), trees)
        for entry in entries(config):
            if entry.torch_name in named:
                entry.write(trees, named[entry.torch_name])
        return Weights(trees[PARAMS], trees[ROUTING_BIAS])

    mu, nu = (tree_of(named, weights).params for named in (first.mu, first.nu))
    reached = tree_of(first.params | first.routing_bias, weights)
    model = torch_model(config, weights, "float64", case)
    state = model.state_dict()
    named = first.params | first.routing_bias
    for name, value in state.items():
        value.copy_(torch.from_numpy(hf_side.in_memory(name, named, config.n_routed_experts).copy()))
    moments = OptimizerState(np.asarray(half, np.int32), mu, nu)
    second = torch_train(model, training, batches[half:], moments)
    assert reached.params.keys() == weights.params.keys()
    for one, other in ((whole.params, second.params), (whole.mu, second.mu), (whole.nu, second.nu)):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-9, atol=1e-12, err_msg=name)
    for name, bias in whole.routing_bias.items():
        np.testing.assert_allclose(bias, second.routing_bias[name], atol=1e-12)


# a run of train.py

SHAPE = (
    "--preset", "tiny-deepseek", "--model.hidden-size", "48", "--model.num-hidden-layers", "2",
    "--model.moe-intermediate-size", "32", "--model.intermediate-size", "64", "--model.vocab-size", "400",
)  # fmt: skip
SHORT = (
    "--batch-size", "4", "--seq-len", "48", "--steps", "6", "--warmup-steps", "1", "--save-every", "6",
    "--eval-samples", "8", "--sample-tokens", "0", "--optimizer", "adamw",  # compiles faster than the default
)  # fmt: skip


@pytest.mark.slow
def test_a_trained_run_continues_a_prompt_in_stock_transformers(corpus, tmp_path):
    """As a user does it: train, export, `pipeline` without remote code; then fine-tune what was exported."""
    run, out, again = (str(tmp_path / name) for name in ("run", "out", "again"))
    data = ["--data", str(corpus)]
    assert train.main([*SHAPE, *SHORT, *data, "--eval-every", "3", "--run-dir", run]) == 0
    assert convert(["to-torch", run, out]) == 0
    assert not list(Path(out).glob("*.py"))
    prompt, new = "def read(self):", 12
    client = transformers.pipeline("text-generation", model=out, tokenizer=out, dtype=torch.float32)
    theirs = client(prompt, do_sample=False, max_new_tokens=new, return_full_text=False)[0]["generated_text"]
    tokenizer = load_tokenizer(out)
    ids = encode_prompt(tokenizer, prompt)
    (ours,) = generate(load_model(Path(run)), [ids], new, eos_token_ids=[tokenizer.eos_token_id])
    assert decode_after(tokenizer, ids, ours) == theirs

    kept = ["--learning-rate", "0", "--bias-update-rate", "0", "--eval-every", "1"]
    assert train.main(["--init", out, "--run-dir", again, *SHORT, *data, *kept]) == 0
    trained = [record for record in read_metrics(Path(run)) if "eval_loss" in record][-1]
    started = next(record for record in read_metrics(Path(again)) if "eval_loss" in record)
    np.testing.assert_allclose(started["eval_loss"], trained["eval_loss"], rtol=1e-6)
    assert convert(["to-torch", again, str(tmp_path / "back")]) == 0
    back, whole = (load_file(Path(folder) / "model.safetensors") for folder in (tmp_path / "back", out))
    assert back.keys() == whole.keys()
