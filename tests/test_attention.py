"""Attention by blocks equals the plain formula, padding included, and keeps nothing that grows with the square of T."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import PRESETS, LoraConfig, ModelConfig
from jaxllm.model.kernels import (
    ANY,
    CUDA,
    choose_kernels,
    describe_kernels,
    grouped_adapted,
    grouped_loop,
    grouped_triton,
    packed,
)
from jaxllm.model.kernels.causal_attention import blocked_attention, cudnn_attention

SCALE = 0.3


def plain_attention(q, k, v, attention_mask, scale):
    """The definition, in one piece: (B,T,H,h), (B,T,H,h), (B,T,H,v) -> (B,T,H,v)."""
    length = q.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))
    if attention_mask is not None:
        mask = mask & (attention_mask[:, None, :, None] == attention_mask[:, None, None])
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * scale
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


@functools.partial(jax.jit, static_argnums=0)
def out_and_gradients(attention, q, k, v, attention_mask, cotangent):
    out, pullback = jax.vjp(lambda *args: attention(*args, attention_mask, SCALE), q, k, v)
    return out, *pullback(cotangent)


# shorter than a block, a whole block, a ragged end, several spans, spans of two blocks with a ragged end
@pytest.mark.parametrize("length", [1, pytest.param(40, marks=pytest.mark.slow), 128, 300, 1300])
@pytest.mark.parametrize("padding", ["none", "left", "right", "documents"])
def test_blocks_equal_the_plain_formula_to_rounding(length, padding):
    with jax.enable_x64(True):
        q, k, v, cotangent = jax.random.normal(jax.random.key(0), (4, 2, length, 2, 6), jnp.float64)
        v, cotangent = v[..., :4], cotangent[..., :4]  # the value heads have another size
        mask = None if padding == "none" else jnp.ones((2, length)).at[0, : length // 3].set(0)
        if padding == "right":
            mask = mask[:, ::-1]
        if padding == "documents":
            mask = 1 + (jnp.arange(length) >= jnp.asarray([[length // 3], [length // 2]])).cumsum(axis=1) // 37
        results = (
            out_and_gradients(attention, q, k, v, mask, cotangent) for attention in (blocked_attention, plain_attention)
        )
        for ours, theirs in zip(*results, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_memory_grows_with_the_length_and_not_its_square():
    def temporaries(length: int) -> int:
        def loss(q, k, v):
            return blocked_attention(q, k, v, None, SCALE).sum()

        shape = jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32)
        program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 2.2 * temporaries(2048)


def test_the_choice_of_kernels():
    model = PRESETS["customllm-1b"]
    on_cpu = choose_kernels(model, jnp.float32)
    assert on_cpu == choose_kernels(model, jnp.float32, ANY)
    assert (on_cpu.routed, on_cpu.attention, on_cpu.packs) == (grouped_loop.KERNELS, blocked_attention, False)
    assert choose_kernels(model, jnp.bfloat16, ANY) == dataclasses.replace(on_cpu, packs=packed.NEEDED)
    assert not choose_kernels(model, jnp.bfloat16, CUDA).packs
    on_gpu = choose_kernels(model, jnp.bfloat16, CUDA)
    assert (on_gpu.routed, on_gpu.attention) == (grouped_triton.KERNELS, cudnn_attention)
    assert choose_kernels(model, jnp.bfloat16, CUDA, remat=True) == on_gpu  # it saves what the experts' kernels made
    assert choose_kernels(model, jnp.float32, ANY, remat=True).routed.recomputes
    assert choose_kernels(model, jnp.float32, CUDA).attention is blocked_attention
    assert choose_kernels(model, jnp.float64, CUDA) == on_cpu
    odd = ModelConfig(vocab_size=8, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, moe_intermediate_size=9)
    assert choose_kernels(odd, jnp.bfloat16, CUDA).routed == grouped_loop.KERNELS
    described = describe_kernels(model, jnp.bfloat16, CUDA)
    assert "cuDNN" in described
    assert "plain products" not in described
    shared, experts = (LoraConfig(rank=4, targets=target) for target in ("shared", "experts"))
    assert choose_kernels(model, jnp.bfloat16, CUDA, lora=experts).routed == grouped_adapted.KERNELS
    assert describe_kernels(model, jnp.bfloat16, CUDA, lora=experts) == described
    assert "shared experts: plain products" in describe_kernels(model, jnp.bfloat16, CUDA, lora=shared)
    with pytest.raises(ValueError, match="platform is 'gpu'"):
        choose_kernels(model, jnp.float32, "gpu")
