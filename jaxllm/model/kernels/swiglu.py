"""SwiGLU (arXiv:2002.05202) times a weight for each row, and its gradient: elementwise, so that a kernel can do it too.

    M rows    F expert hidden

Both compute in float32 or wider, whatever dtype the arguments have.
"""

import jax
import jax.numpy as jnp

from jaxllm.model.dtypes import Array, at_least_float32


def swiglu(gate: Array, up: Array, weight: Array) -> Array:
    """`weight * silu(gate) * up`: (M,F), (M,F), (M,1) -> (M,F)."""
    gate, up, weight = _wide(gate, up, weight)
    return weight * (gate * jax.nn.sigmoid(gate) * up)


def swiglu_gradients(gate: Array, up: Array, weight: Array, d_out: Array) -> tuple[Array, Array, Array, Array]:
    """The result of `swiglu` again, and its gradients for `gate`, `up` (M,F) and `weight`, (M,) summed over F."""
    gate, up, weight, d_out = _wide(gate, up, weight, d_out)
    sigmoid = jax.nn.sigmoid(gate)
    gated = gate * sigmoid
    h = gated * up
    d_h = d_out * weight
    return weight * h, d_h * up * (sigmoid + gated * (1 - sigmoid)), d_h * gated, (d_out * h).sum(axis=-1)


@jax.custom_vjp
def plain_swiglu(gate: Array, up: Array) -> Array:
    """`silu(gate) * up` in the dtype of `gate`, each (..., F). Only the arguments are saved for the backward pass."""
    return swiglu(gate, up, jnp.ones((), gate.dtype)).astype(gate.dtype)


def _backward(saved: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    gate, up = saved
    _, d_gate, d_up, _ = swiglu_gradients(gate, up, jnp.ones((), d_out.dtype), d_out)
    return d_gate.astype(gate.dtype), d_up.astype(up.dtype)


plain_swiglu.defvjp(lambda gate, up: (plain_swiglu(gate, up), (gate, up)), _backward)


def _wide(*arrays: Array) -> tuple[Array, ...]:
    return tuple(array.astype(at_least_float32(array.dtype)) for array in arrays)
