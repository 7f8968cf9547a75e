"""A small Llama in NNX, written for this comparison: a readable port of transformers' LlamaForCausalLM.

`eps` and `theta` have the defaults of many ports, which a config overrides.
"""

import jax
import jax.numpy as jnp
from flax import nnx


def rotated(x, positions, theta):
    """Rotary embedding: pairs are (i, i + D/2). x: (B, T, N, D)."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None] * frequencies
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RMSNorm(nnx.Module):
    def __init__(self, size, eps):
        self.scale, self.eps = nnx.Param(jnp.ones(size)), eps

    def __call__(self, x):
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return self.scale * wide.astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, size, heads, kv_heads, theta, rngs):
        self.heads, self.kv_heads, self.head_dim, self.theta = heads, kv_heads, size // heads, theta
        self.query = nnx.Linear(size, heads * self.head_dim, use_bias=False, rngs=rngs)
        self.key = nnx.Linear(size, kv_heads * self.head_dim, use_bias=False, rngs=rngs)
        self.value = nnx.Linear(size, kv_heads * self.head_dim, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(heads * self.head_dim, size, use_bias=False, rngs=rngs)

    def __call__(self, x, mask):
        batch, length, _ = x.shape
        positions = jnp.cumsum(mask, axis=1) - 1
        query = rotated(self.query(x).reshape(batch, length, self.heads, -1), positions, self.theta)
        key = rotated(self.key(x).reshape(batch, length, self.kv_heads, -1), positions, self.theta)
        value = self.value(x).reshape(batch, length, self.kv_heads, -1)
        key, value = (jnp.repeat(part, self.heads // self.kv_heads, axis=2) for part in (key, value))
        scores = jnp.einsum("btnd,bsnd->bnts", query, key) / self.head_dim**0.5
        seen = jnp.tril(jnp.ones((length, length), bool)) & mask[:, None, None, :]
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30).astype(jnp.float32), axis=-1).astype(x.dtype)
        mixed = jnp.einsum("bnts,bsnd->btnd", weights, value)
        return self.out(mixed.reshape(batch, length, -1))


class MLP(nnx.Module):
    def __init__(self, size, hidden, rngs):
        self.gate = nnx.Linear(size, hidden, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(size, hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(hidden, size, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    def __init__(self, size, hidden, heads, kv_heads, eps, theta, rngs):
        self.attention_norm, self.mlp_norm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.attention = Attention(size, heads, kv_heads, theta, rngs)
        self.mlp = MLP(size, hidden, rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    def __init__(self, vocab, size, hidden, layers, heads, kv_heads, rngs, eps=1e-6, theta=10_000.0):
        self.embed = nnx.Embed(vocab, size, rngs=rngs)
        self.layers = nnx.List([Layer(size, hidden, heads, kv_heads, eps, theta, rngs) for _ in range(layers)])
        self.norm = RMSNorm(size, eps)
        self.head = nnx.Linear(size, vocab, use_bias=False, rngs=rngs)

    def __call__(self, ids, mask=None):
        mask = jnp.ones(ids.shape, bool) if mask is None else mask
        x = self.embed(ids)
        for layer in self.layers:
            x = nnx.remat(lambda layer, x: layer(x, mask))(layer, x)
        return self.head(self.norm(x))
