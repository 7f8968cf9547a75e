"""The contenders of the PyTorch worker, the yardsticks. Each function returns contenders and facts about them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from benchmarks.sizes import decode_model, decode_prompts, peak_sizes, train_config, train_labels
from benchmarks.worker import Contender, repeated
from jaxllm.config import ModelConfig, TrainConfig
from parity_tests.forward import random_weights, torch_model
from torch_ref import CustomLLM
from torch_ref.generate import generate
from torch_ref.step import make_optimizer, make_schedule, train_step

Prepared = tuple[dict[str, Contender], dict[str, Any]]


def shared_model(config: ModelConfig) -> CustomLLM:
    """The model with the same weights as in the JAX worker; the routing bias is zero, as in a new run."""
    model = torch_model(config, random_weights(config))
    for layer in model.decoder_layers:
        layer.mlp.routing_bias.zero_()
    return model


def train_steps(quick: bool, compiled: bool = False) -> Prepared:
    """The training step of `torch_ref` in float32 and under bfloat16 autocast, on one model."""
    config = train_config(quick)
    model = shared_model(config.model).train()
    if compiled:
        model.compile(fullgraph=True)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config)
    labels = torch.from_numpy(train_labels(config)).long()

    def contender(precision: str) -> Contender:
        run = config.with_options(precision=precision)
        return lambda: {"loss": float(train_step(model, optimizer, schedule, run, labels).loss)}

    facts = {"parameters": sum(p.numel() for p in model.parameters())}
    return {precision: contender(precision) for precision in ("float32", "bfloat16")}, facts


def matrix_products(quick: bool) -> Prepared:
    """Bfloat16 products of square matrices."""

    def contender(n: int) -> Contender:
        a, b = torch.randn(2, n, n).bfloat16()
        return repeated(lambda: a @ b, quick)

    return {f"PyTorch's product {n}": contender(n) for n in peak_sizes(quick)}, {}


def deepseek_model(m: ModelConfig) -> DeepseekV3ForCausalLM:
    """transformers' DeepSeek-V3 with the sizes of a config, random weights, in train mode."""
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=m.vocab_size,
            hidden_size=m.hidden_size,
            num_hidden_layers=m.num_hidden_layers,
            num_attention_heads=m.num_attention_heads,
            num_key_value_heads=m.num_attention_heads,
            q_lora_rank=m.q_latent_size,
            kv_lora_rank=m.kv_latent_size,
            qk_nope_head_dim=m.nope_head_dim,
            qk_rope_head_dim=m.rope_head_dim,
            v_head_dim=m.head_dim,
            moe_intermediate_size=m.moe_intermediate_size,
            n_routed_experts=m.n_routed_experts,
            n_shared_experts=m.n_shared_experts,
            num_experts_per_tok=m.num_experts_per_tok,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.0,
            first_k_dense_replace=0,  # every layer has experts
            num_nextn_predict_layers=0,
            max_position_embeddings=m.max_position_embeddings,
            use_cache=False,
        )
    ).train()


def deepseek_training(
    config: TrainConfig, device: torch.device
) -> tuple[DeepseekV3ForCausalLM, Callable[[Tensor, str], Tensor]]:
    """transformers' DeepSeek-V3 with the sizes of a config, and its training step as the Trainer runs it.

    The Trainer leaves the routing bias as it is. The learning curves, which need it, train by `torch_ref.step`.

    Returns:
        The model, and a function of micro-batches (A,B,T) and the precision that returns their mean loss.
    """
    with device:
        model = deepseek_model(config.model)
    parameters = [*model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.optim.learning_rate, fused=True)  # the Trainer's default
    schedule = make_schedule(optimizer, config)

    def step(labels: Tensor, precision: str) -> Tensor:
        total = torch.zeros((), device=device)
        for micro in labels:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                loss = model(micro, labels=micro).loss / len(labels)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, config.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        return total

    return model, step


def deepseek_steps(quick: bool) -> Prepared:
    """The training step of transformers' DeepSeek-V3 with the sizes of `train_steps`.

    Both precisions, each with both implementations of the experts in transformers.
    """
    config = train_config(quick)
    m = config.model
    model, step = deepseek_training(config, torch.device("cpu"))
    labels = torch.from_numpy(train_labels(config)).long()

    def contender(precision: str, experts: str) -> Contender:
        def go() -> dict[str, float]:
            model.set_experts_implementation(experts)
            return {"loss": float(step(labels, precision))}

        return go

    idle = m.n_routed_experts - m.num_experts_per_tok
    total = sum(p.numel() for p in model.parameters())
    unused = m.num_hidden_layers * idle * 3 * m.hidden_size * m.moe_intermediate_size
    facts = {"parameters": total, "active_parameters": total - unused}
    kinds = itertools.product(("float32", "bfloat16"), ("eager", "grouped_mm"))
    return {f"{precision} {experts}": contender(precision, experts) for precision, experts in kinds}, facts


def decoding(name: str, work: dict[str, list[int]], quick: bool) -> Prepared:
    """The work of `jax_side.decoding`, with weights in the same precision; and a sum over more than the caches hold."""
    config = decode_model(name, quick)
    model = shared_model(config)
    models = {"float32": model, "bfloat16": copy.deepcopy(model).bfloat16()}

    def contender(model: CustomLLM, rows: int, prompt: int, new: int) -> Contender:
        ids = decode_prompts(config, rows, prompt)

        def go() -> None:
            generate(model, ids, new)

        return go

    numbers = torch.ones(2**20 if quick else 2**28)

    def read() -> None:
        numbers.sum()

    contenders = {f"{key} {p}": contender(model, *sizes) for key, sizes in work.items() for p, model in models.items()}
    return contenders | {"read": read}, {"read_bytes": numbers.nbytes}
