"""Adapters equal PEFT's on transformers' models and on torch_ref's: files, logits, gradients, training, tokens."""

from __future__ import annotations

import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import train
from convert.__main__ import main as convert
from convert.adapter import read_adapter, write_adapter
from jaxllm.config import LoraConfig, ModelConfig, TrainConfig, families
from jaxllm.model.adapters import merged_weights
from jaxllm.model.decoder import abstract_adapted, abstract_model
from jaxllm.model.decoding import Sampling, generate
from jaxllm.store.checkpoint import Weights
from jaxllm.train.step import merged
from parity_tests.__main__ import main as compare
from parity_tests.adapter_mutations import ADAPTER_MUTATIONS
from parity_tests.adapters import AdapterRung, Adapters, in_peft, with_noise
from parity_tests.compare import TOLERANCES, Row
from parity_tests.deepseek_cases import CASES
from parity_tests.forward import Base, random_weights
from parity_tests.forward_rungs import Subject
from parity_tests.settings import Settings, Sizes, make_plan

pytest.importorskip("peft")

CUSTOMLLM = ModelConfig(
    vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, moe_intermediate_size=24,
    n_routed_experts=4, n_shared_experts=2, max_position_embeddings=64, dropout=0.0,
)  # fmt: skip
EVERYWHERE = "attention,shared,dense,experts"
TOKENS = np.random.default_rng(0).integers(0, 97, 5000)


class Case(NamedTuple):
    config: ModelConfig
    adapters: Adapters

    @property
    def interleaved(self) -> bool:
        return families.is_interleaved(self.adapters.source)


def case_of(name: str, rank: int, targets: str = EVERYWHERE, **options: Any) -> Case:
    source = None if name == "customllm" else dict(CASES[name])
    config = CUSTOMLLM if source is None else families.read_config(source)
    lora = LoraConfig(**{"rank": rank, "alpha": 3.0 * rank, "targets": targets, "base_dtype": "float32"} | options)
    rng, weights = np.random.default_rng(rank), random_weights(config)
    if lora.base_dtype == "bfloat16":
        weights = weights._replace(params=jax.tree.map(_in_bfloat16, weights.params))
    shapes = abstract_adapted(config, lora)
    # B too: of the adapters of a new run B is zero, which would hide A
    params = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), shapes.params)
    adapters = Adapters(Weights(params, weights.routing_bias), Base(lora, weights.params), source)
    return Case(config, adapters)


def _in_bfloat16(leaf: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(leaf, jnp.bfloat16), np.float32)


def rung_of(case: Case, precision: str = "float64", steps: int = 5) -> AdapterRung:
    """At the settings of a run of `steps` steps."""
    run = TrainConfig.from_options(
        model=case.config, steps=steps, seq_len=24, warmup_steps=2, learning_rate=1e-3, beta2=0.98, max_grad_norm=0.5,
        balance_loss=1e-2, router_z_loss=1e-3,
    )  # fmt: skip
    plan = make_plan(case.config, precision, Settings(steps=steps, run=run, sizes=Sizes(1, 1, 24), widens=False))
    subject = Subject(case.config, case.adapters.weights, precision, TOLERANCES[precision], case.interleaved)
    return AdapterRung(subject, case.adapters, plan, TOKENS, TOKENS[None, :24])  # one shape for all


def failures(rows: list[Row]) -> list[Row]:
    assert rows
    return [row for row in rows if not row.passed]


def largest(rows: list[Row], *kinds: str) -> float:
    """The largest relative L2 difference of some comparisons, or of all."""
    return max(row.relative_l2 or 0.0 for row in rows if row.what.startswith(kinds or ""))


@pytest.fixture(scope="module")
def rung():
    """The Flax side is computed once for all tests of a model."""
    return functools.cache(lambda name: rung_of(case_of(name, 2)))


@pytest.mark.parametrize("name", ["v3", "customllm"])
def test_logits_gradients_and_a_step_equal_peft_s(rung, name):
    found = [*rung(name).compare()]
    assert failures(found) == []
    assert largest(found, "logits", "gradients") < 1e-10
    assert {row.what.partition(",")[0] for row in found} == {
        "weights", "logits", "training loss", "gradients", "gradient norm", "first moments", "second moments", "update",
        "routing bias", "next learning rate", "expert load",
    }  # fmt: skip
    training = rung(name).training
    grads = training.jax.gradients_of_a_step(training.wide_batch).grads
    assert all(np.any(gradient) or ".routed_experts." in n for n, gradient in grads.items())  # one may get no token


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rank", "options"),
    [
        ("v3", 8, {}),
        ("v3", 1, {"base_dtype": "bfloat16"}),
        ("v3-halves", 8, {}),
        ("v2-lite", 1, {}),
        ("v2-lite", 8, {}),
        ("glm", 1, {}),
        ("glm", 8, {"rslora": True}),
        ("youtu", 8, {"targets": "attention,dense"}),
        ("customllm", 1, {"base_dtype": "bfloat16"}),
        ("customllm", 8, {"targets": "experts"}),
    ],
)
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_all_shapes_equal_peft_s(name, rank, options, precision):
    found = [*rung_of(case_of(name, rank, **options), precision).compare()]
    assert failures(found) == []
    assert precision == "float32" or largest(found, "logits", "gradients") < 1e-10


@pytest.mark.parametrize("name", ["v3", "customllm"])
@pytest.mark.parametrize("fault", ADAPTER_MUTATIONS)
def test_a_planted_fault_is_seen_in_the_first_comparison_that_can(rung, name, fault):
    mutation = ADAPTER_MUTATIONS[fault]
    with mutation.plant(None):
        caught = next((row for row in rung(name).compare() if not row.passed), None)
    assert caught is not None
    assert (caught.rung, caught.what) == (mutation.rung, mutation.what)


def test_what_peft_cannot_load_is_a_difference(rung):
    case = case_of("v3", 2)
    other = case.adapters.base._replace(lora=case_of("v3", 4).adapters.base.lora)
    (row,) = rung_of(case._replace(adapters=case.adapters._replace(base=other))).compare()
    assert not row.passed
    assert "PEFT does not load them" in row.note


def test_a_b_of_zeros_does_not_hide_a():
    case = case_of("customllm", 2)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (path[-1].key == "a"), case.adapters.weights.params
    )  # fmt: skip
    filled, note = with_noise(params, case.adapters.base.lora)
    assert all(leaf.any() for leaf in jax.tree.leaves(filled))
    assert note.startswith("noise in ")
    assert with_noise(filled, case.adapters.base.lora)[1] == ""


@pytest.mark.parametrize("name", ["v3", "customllm"])
def test_a_folder_of_adapters_is_read_as_it_was_written(tmp_path, name):
    case = case_of(name, 2)
    lora, params = case.adapters.base.lora, case.adapters.weights.params
    write_adapter(tmp_path, case.config, lora, params, "base", case.interleaved)
    back = read_adapter(tmp_path, case.config, abstract_adapted(case.config, lora).params, case.interleaved)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_greedy_tokens_are_peft_s():
    """Of the adapter beside the base in PEFT, of PEFT's merged model, and of this project's."""
    case = case_of("v3", 8)
    model = in_peft(case.config, case.adapters, "float32")
    weights, base = case.adapters.weights, case.adapters.base
    trees = jax.tree.map(jnp.array, (*weights, base.frozen))
    whole = merged_weights(merged(abstract_adapted(case.config, base.lora).graph, *trees))
    ours = nnx.merge(abstract_model(case.config)[0], whole, jax.tree.map(jnp.asarray, weights.routing_bias))
    prompt = TOKENS[None, :12]
    found = generate(ours, prompt.tolist(), 16, Sampling(temperature=0.0), seed=0, eos_token_ids=())
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for peft_model in (model, model.merge_and_unload()):
        with torch.no_grad():
            made = peft_model.generate(input_ids=torch.from_numpy(prompt), **options)
        assert made[0, 12:].tolist() == found[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v3", "customllm"])
def test_50_steps_equal_peft_s(name):
    """AdamW, the rate of the schedule, clipping and decay, in float64: 1e-8 of each factor."""
    case = case_of(name, 8)
    rung = rung_of(case, steps=50)
    rows = rung.training.trajectory(in_peft(case.config, case.adapters, "float64").get_base_model())
    assert failures(rows) == []
    assert not [line for line in rung.training.not_compared if line.startswith("steps ")]
    apart = largest(rows, "losses", "parameters")  # JAX has the learning rates in float32
    print(f"after 50 steps the largest difference is {apart:.1e}")
    assert apart < 1e-8


@pytest.mark.slow
def test_the_command_compares_the_adapters_of_a_run(run, narrow, tmp_path, capsys):
    """On a base in bfloat16: the merged weights are wider, and are compared as they are."""
    base, trained, out = (tmp_path / name for name in ("base", "run", "out"))
    assert convert(["to-torch", str(run), str(base), "--dtype", "bfloat16"]) == 0
    options = ("--init", str(base), "--lora-rank", "2", "--steps", "3", "--warmup-steps", "1", "--optimizer", "adamw")
    data = narrow[narrow.index("--data") :][:2]
    assert train.main([*data, *options, "--batch-size", "2", "--seq-len", "64", "--run-dir", str(trained)]) == 0
    arguments = [str(trained), "--quick", "--rungs", "weights", "logits", "adapters", "--out", str(out)]
    assert compare(arguments) == 0
    said = capsys.readouterr().out
    assert "Adapters in float32: rank 2, alpha 4, attention,shared,dense, in PEFT" in said
    assert "more than one step of the run's adapters" in said
    report = json.loads((out / "parity.json").read_text())
    assert {"logits", "gradients", "update"} <= {row["what"] for row in report["rows"] if row["rung"] == "adapters"}
    assert compare([*arguments, "--mutate", "adapter_left_out"]) == 1
    assert "BREACH, first in: logits (rung adapters)" in capsys.readouterr().out
