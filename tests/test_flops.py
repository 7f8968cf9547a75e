"""Parameters and FLOPs by arithmetic, against what the frameworks hold and count."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from jaxllm.config import PRESETS, ModelConfig, TrainConfig
from jaxllm.model import flops
from jaxllm.model.batch import TokenBatch
from jaxllm.model.decoder import STACKS, abstract_model, count_parameters
from jaxllm.run.throughput import Meter, TokenFlops
from jaxllm.train.step import eval_step

ODD = ModelConfig(
    vocab_size=331,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    moe_intermediate_size=40,
    compression_ratio=3,
    n_routed_experts=5,
    n_shared_experts=2,
    num_experts_per_tok=3,
    max_position_embeddings=64,
    final_norm=True,
)
BATCH, LENGTH = 2, 24
CONFIG = TrainConfig.from_options(model=ODD, seq_len=LENGTH, batch_size=BATCH)


@pytest.mark.parametrize(("preset", "total"), [("customllm-1b", 1_075_060_736), ("customllm-768", 793_921_536)])
def test_the_source_s_sizes(preset, total):
    assert sum(flops.parameters(PRESETS[preset]).values()) == total


@pytest.mark.parametrize("config", [ODD, *PRESETS.values()])
def test_parameters_are_those_of_the_model(config):
    params = abstract_model(config)[1]
    parts = flops.parameters(config)
    assert sum(parts.values()) == count_parameters(params)
    assert parts["routed_experts"] == count_parameters(params["decoder_layers"]["mlp"]["routed_experts"])
    stacks = [params[name] for name in STACKS if name in params]
    assert parts["attention"] == sum(count_parameters(layers["self_attn"]) for layers in stacks)


# those of transformers' models on the meta device, without the routing bias and multi-token prediction
@pytest.mark.parametrize(
    ("preset", "total"),
    [
        ("deepseek-v2-lite", 15_706_484_224),
        ("deepseek-v2", 235_741_434_880),
        ("deepseek-v3", 671_026_404_352),
        ("moonlight-16b", 15_960_108_544),
        ("kimi-k2", 1_026_408_209_408),
        ("glm-4.7-flash", 29_943_390_976),
    ],
)
def test_the_public_models_sizes(preset, total):
    assert sum(flops.parameters(PRESETS[preset]).values()) == total


def test_active_parameters_leave_out_the_experts_that_are_not_chosen():
    idle = 24 * (7 - 2) * 3 * 1024 * 1536
    assert sum(flops.active_parameters(PRESETS["customllm-1b"]).values()) == 1_075_060_736 - idle
    dense = dataclasses.replace(ODD, num_experts_per_tok=5)
    assert flops.active_parameters(dense) == flops.parameters(dense)


def product_flops(jaxpr) -> float:
    """FLOPs of the products in a jaxpr but those with a vector; a loop of unknown length counts nothing."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and all(variable.aval.ndim > 1 for variable in equation.invars):
            contracted, _ = equation.params["dimension_numbers"][0]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "while":
            continue
        if equation.primitive.name == "cond":  # one branch for each platform
            total += max(product_flops(branch.jaxpr) for branch in equation.params["branches"])
            continue
        trips = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += trips * sum(product_flops(inner) for inner in jaxprs_in_params(equation.params))
    return total


def test_forward_flops_are_the_products_that_jax_traces():
    """Except the routed experts': their trip counts depend on the rows."""
    graph, params, bias = abstract_model(ODD)
    rows = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    traced = jax.make_jaxpr(functools.partial(eval_step, graph))(params, bias, TokenBatch(rows))
    parts = flops.forward_flops(ODD, LENGTH, "full")
    routed = parts.pop("routed_experts")
    assert product_flops(traced.jaxpr) == BATCH * LENGTH * sum(parts.values())
    # a routed expert costs a token what a shared one does
    assert routed / ODD.num_experts_per_tok == parts["shared_experts"] / ODD.n_shared_experts


def test_forward_flops_are_those_that_pytorch_counts():
    """All of them: the reference multiplies each expert's rows, and no others."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from torch_ref import CustomLLM

    model = CustomLLM(ODD).eval()
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids)
    assert counter.get_total_flops() == BATCH * LENGTH * sum(flops.forward_flops(ODD, LENGTH, "full").values())


def test_the_two_conventions_differ_by_half_of_the_attention_products():
    full, causal = (flops.forward_flops(ODD, LENGTH, attention) for attention in ("full", "causal"))
    for part in full:
        factor = 0.5 if part in ("attention_scores", "attention_values") else 1
        assert causal[part] == factor * full[part]
    assert flops.training_flops_per_token(ODD, LENGTH, "full") == 3 * sum(full.values())


def test_the_meter_counts_laps_evaluations_and_waiting(monkeypatch):
    clock = iter([100.0, 104.0, 112.0, 120.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    waits = iter([1.0, 1.0, 3.0])
    per_token = flops.training_flops_per_token(ODD, LENGTH, "full")
    token_flops = TokenFlops.of(ODD, LENGTH, frozen=False)
    # at the peak: one step a second
    meter = Meter(BATCH * LENGTH, token_flops, 1e-12 * per_token * BATCH * LENGTH, lambda: next(waits))
    first = meter.lap(2)  # 4 s, of which 1 waiting
    assert (first.mfu_full, first.data_wait) == (pytest.approx(0.5), 0.25)
    assert first.tokens_per_second == 2 * BATCH * LENGTH / 4
    meter.exclude(6.0)
    assert meter.lap(2).mfu_full == pytest.approx(1.0)  # 8 s, of which 6 evaluating
    _, seconds, whole = meter.totals(4)
    assert (seconds, whole.mfu_full, whole.data_wait) == (20.0, pytest.approx(0.2), pytest.approx(0.15))
