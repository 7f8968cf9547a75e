"""Adapters equal PEFT's on transformers' models and on torch_ref's: files, logits, gradients, training, tokens."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from convert.adapter import adapted, read_adapter, write_adapter
from convert.mapping import PARAMS
from jaxllm.config import LoraConfig, ModelConfig, TrainConfig, families
from jaxllm.model.adapters import merged_weights
from jaxllm.model.batch import TokenBatch
from jaxllm.model.decoder import AdaptedModel, abstract_adapted, abstract_model
from jaxllm.model.decoding import Sampling, generate
from jaxllm.store.checkpoint import Weights
from jaxllm.train.optim import learning_rate
from jaxllm.train.state import start_state
from jaxllm.train.step import merged, summed_loss, train_step
from parity_tests.deepseek_cases import CASES
from parity_tests.forward import jax_precision, random_weights, torch_model

peft = pytest.importorskip("peft")

CUSTOMLLM = ModelConfig(
    vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, moe_intermediate_size=24,
    n_routed_experts=4, n_shared_experts=2, max_position_embeddings=64, dropout=0.0,
)  # fmt: skip
EVERYWHERE = "attention,shared,dense,experts"


class Case(NamedTuple):
    config: ModelConfig
    source: dict[str, Any] | None
    """The config.json."""
    lora: LoraConfig
    weights: Weights
    params: Any
    """Random adapters, B too: of the adapters of a new run B is zero, which would hide A."""

    @property
    def interleaved(self) -> bool:
        return families.is_interleaved(self.source)

    def shapes(self, dtype: Any = jnp.float32) -> AdaptedModel:
        return abstract_adapted(self.config, self.lora, dtype=dtype)


def case_of(name: str, rank: int, targets: str = EVERYWHERE, **options: Any) -> Case:
    source = None if name == "customllm" else dict(CASES[name])
    config = CUSTOMLLM if source is None else families.read_config(source)
    lora = LoraConfig(rank=rank, alpha=3.0 * rank, targets=targets, **options)
    rng = np.random.default_rng(rank)
    shapes = abstract_adapted(config, lora)
    params = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), shapes.params)
    return Case(config, source, lora, random_weights(config), params)


IDS = np.random.default_rng(0).integers(0, 97, (2, 40))


def loss_and_gradients(case: Case) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
    """Loss, logits, and the gradients of A and B by PEFT's names, in float64."""
    with jax_precision("float64"):
        wide = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(leaf, jnp.float64))
        graph, (params, frozen, bias) = case.shapes(jnp.float64).graph, wide((case.params, *case.weights))

        def loss(params: Any):
            model = nnx.merge(graph, params, bias, frozen)
            x = model.hidden_states(jnp.asarray(IDS)).last
            return summed_loss(model, x, jnp.asarray(IDS)) / (IDS[:, 1:].size), model.logits(x)

        (value, logits), grads = jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
    return float(value), logits, named(case, grads)


def named(case: Case, params: Any) -> dict[str, np.ndarray]:
    trees = {PARAMS: jax.tree.map(np.asarray, params)}
    found = adapted(case.config, params, case.interleaved)
    return {factor.torch_name: factor.to_torch(trees) for one in found for factor in (one.a, one.b)}


def in_peft(case: Case, folder: Path, precision: str = "float64") -> Any:
    """The PyTorch model with the adapter, as a user loads both."""
    write_adapter(folder, case.config, case.lora, case.params, "base", case.interleaved)
    base = torch_model(case.config, case.weights, precision, case.source)
    model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True, autocast_adapter_dtype=False)
    return model.to(torch.float64 if precision == "float64" else torch.float32).eval()


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    difference = float(np.linalg.norm(ours - theirs))
    return difference / float(np.linalg.norm(theirs)) if difference else 0.0


@pytest.mark.parametrize(
    ("name", "rank", "options"),
    [
        ("v3", 1, {}),
        pytest.param("glm", 8, {"rslora": True}, marks=pytest.mark.slow),
        *(
            pytest.param(name, rank, {}, marks=pytest.mark.slow)
            for name, rank in (
                ("customllm", 1),
                ("customllm", 8),
                ("v2-lite", 1),
                ("v2-lite", 8),
                ("v3", 8),
                ("glm", 1),
                ("youtu", 8),
                ("v3-halves", 8),
            )
        ),
    ],
)
def test_logits_and_gradients_equal_peft_s(tmp_path, name, rank, options):
    targets = "attention,dense" if name == "youtu" else EVERYWHERE
    case = case_of(name, rank, targets, **options)
    loss, logits, grads = loss_and_gradients(case)
    model, tokens = in_peft(case, tmp_path), torch.from_numpy(IDS)
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    theirs = {n.replace(".default", ""): p.grad.numpy() for n, p in model.named_parameters() if p.requires_grad}
    assert grads.keys() == theirs.keys()
    assert relative(logits, out.logits.detach().numpy()) < 1e-10
    assert abs(loss - out.loss.item()) < 1e-10 * loss
    assert {n: relative(grads[n], theirs[n]) for n in grads if relative(grads[n], theirs[n]) >= 1e-10} == {}
    assert all(np.any(gradient) or ".routed_experts." in n for n, gradient in theirs.items())  # one may get no token
    back = read_adapter(tmp_path, case.config, case.shapes().params, case.interleaved)
    jax.tree.map(np.testing.assert_array_equal, back, case.params)


@pytest.mark.parametrize("fault", [pytest.param("scale", marks=pytest.mark.slow), "rows of B"])
def test_a_planted_fault_is_seen(tmp_path, fault):
    """In the folder that PEFT reads: another scale, or the rotary rows of B in the order of halves."""
    case = case_of("v3", 8)
    _, logits, _ = loss_and_gradients(case)
    planted = case._replace(lora=dataclasses.replace(case.lora, rslora=True))
    if fault == "rows of B":
        planted = case._replace(source=case.source and case.source | {"rope_interleave": False})
    base = torch_model(case.config, case.weights, "float64", case.source)
    write_adapter(tmp_path, case.config, planted.lora, case.params, "base", planted.interleaved)
    model = peft.PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False).double().eval()
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(IDS)).logits.numpy()
    assert relative(logits, theirs) > 1e-3


def test_greedy_tokens_are_peft_s(tmp_path):
    """Of the adapter beside the base in PEFT, of PEFT's merged model, and of this project's."""
    case = case_of("v3", 8)
    model = in_peft(case, tmp_path, "float32")
    graph = abstract_adapted(case.config, case.lora).graph
    plain = abstract_model(case.config)[0]
    trees = jax.tree.map(jnp.array, (case.params, case.weights.routing_bias, case.weights.params))
    weights = merged_weights(merged(graph, *trees))
    ours = nnx.merge(plain, weights, jax.tree.map(jnp.asarray, case.weights.routing_bias))
    prompt = IDS[:1, :12]
    found = generate(ours, prompt.tolist(), 16, Sampling(temperature=0.0), seed=0, eos_token_ids=())
    for peft_model in (model, model.merge_and_unload()):
        with torch.no_grad():
            made = peft_model.generate(
                input_ids=torch.from_numpy(prompt),
                max_new_tokens=16,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert made[0, 12:].tolist() == found[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v3", "customllm"])
def test_50_steps_equal_peft_s(tmp_path, name):
    """AdamW, the rate of the schedule, clipping and decay, in float64: 1e-8 of each factor."""
    case = case_of(name, 8)
    config = TrainConfig.from_options(
        model=case.config, batch_size=1, seq_len=24, steps=50, warmup_steps=5, learning_rate=1e-3, max_grad_norm=0.5,
        lora_rank=8, lora_alpha=24.0, lora_targets=EVERYWHERE,
    )  # fmt: skip
    batches = np.random.default_rng(1).integers(0, 97, (50, 1, 1, 24), np.int32)
    with jax_precision("float64"):
        wide = functools.partial(jax.tree.map, lambda leaf: jnp.array(leaf, jnp.float64))
        params, frozen, bias = wide((case.params, *case.weights))
        state = start_state(config.model, config.optim, 0, params, bias)._replace(frozen=frozen)
        graph = case.shapes(jnp.float64).graph
        step = jax.jit(functools.partial(train_step, config.optim, config.schedule, graph), donate_argnums=0)
        losses = []
        for batch in batches:
            state, metrics = step(state, TokenBatch(batch))
            losses.append(float(metrics.loss))
        ours = named(case, jax.device_get(state.params))
        rates = [float(learning_rate(config.schedule, 1e-3, i)) for i in range(50)]
    model = in_peft(case, tmp_path).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optim = config.optim
    adamw = torch.optim.AdamW(
        trained, lr=1.0, betas=(optim.beta1, optim.beta2), eps=optim.adam_eps, weight_decay=optim.weight_decay
    )
    for batch, rate, wanted in zip(batches, rates, losses, strict=True):
        tokens = torch.from_numpy(batch[0]).long()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        assert abs(loss.item() - wanted) < 1e-8 * wanted
        torch.nn.utils.clip_grad_norm_(trained, optim.max_grad_norm)
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
        adamw.zero_grad()
    theirs = {n.replace(".default", ""): p.detach().numpy() for n, p in model.named_parameters() if p.requires_grad}
    found = {n: relative(ours[n], theirs[n]) for n in theirs}
    print(f"after 50 steps the largest difference is {max(found.values()):.1e}")
    assert {n: difference for n, difference in found.items() if difference >= 1e-8} == {}
    started = {n: relative(value, theirs[n]) for n, value in named(case, case.params).items()}
    assert min(started.values()) > 1e-3  # each factor has moved
