"""The matrix product: its values and gradients in every form, whatever a CPU needs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Layout, with_layout_constraint

from jaxllm.model.kernels.matmul import FEW_ROWS, linear, matmul


def random(*shape: int, seed: int = 0, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


TRANSPOSED = [{}, {"transpose_a": True}, {"transpose_b": True}]


def form(x: jax.Array, transposed: bool) -> jax.Array:
    return x.mT if transposed else x


@pytest.mark.parametrize("lead", [(), (3,)], ids=["one", "a batch"])
@pytest.mark.parametrize("rows", [1, FEW_ROWS, 40])
@pytest.mark.parametrize("transposed", TRANSPOSED, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_are_exact_to_their_result_s_rounding(lead, rows, transposed, dtype):
    a, b = random(*lead, rows, 48, dtype=dtype), random(*lead, 48, 24, seed=1, dtype=dtype)

    @jax.jit
    def product(a, b):
        return matmul(a, b, **transposed), matmul(a, b, jnp.float32, **transposed)

    narrow, wide = product(form(a, "transpose_a" in transposed), form(b, "transpose_b" in transposed))
    assert (narrow.dtype, wide.dtype) == (dtype, jnp.float32)
    wanted = np.matmul(np.asarray(a, np.float64), np.asarray(b, np.float64))
    np.testing.assert_allclose(wide, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.asarray(narrow, np.float32), wanted, rtol=2**-8, atol=1e-2)


def fusions(program: str) -> list[str]:
    """The bodies of the computations of a compiled program, other than the entry."""
    return [part for part in program.split("\n\n") if part.startswith("%")]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA's CPU")
def test_a_slice_of_weights_is_cast_before_it_is_transposed():
    """XLA transposes a number at a time what it computes in the same fusion: ten times the time of a copy."""
    masters, d_y = random(3, 64, 48), random(32, 48, dtype=jnp.bfloat16)

    def ours(masters, d_y, layer):
        return matmul(d_y, masters[layer].astype(jnp.bfloat16), transpose_b=True)

    def plain(masters, d_y, layer):  # a control: row-major operands alone
        row_major = Layout(major_to_minor=(0, 1))
        weight = with_layout_constraint(masters[layer].astype(jnp.bfloat16).T, row_major)
        return jnp.matmul(d_y, weight, preferred_element_type=jnp.float32)

    def is_slow(function) -> bool:
        program = jax.jit(function).lower(masters, d_y, jnp.int32(1)).compile().as_text()
        return any("dynamic-slice(" in body and "transpose(" in body for body in fusions(program))

    assert is_slow(plain)
    assert not is_slow(ours)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA's CPU")
@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS])
def test_a_bfloat16_weight_is_read_as_it_is(rows):
    """XLA's CPU converts it to float32 if it multiplies a single row, as a token of a single text."""
    x, weight = random(rows, 64, dtype=jnp.bfloat16), random(64, 48, dtype=jnp.bfloat16)

    def converts(function) -> bool:
        return "f32[64,48]" in jax.jit(function).lower(x, weight).compile().as_text()

    if rows == 1:  # a control; if it fails, XLA has changed and `matmul` need not double a row
        assert converts(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    assert not converts(matmul)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradients_of_a_linear_map_are_those_of_the_formula(dtype):
    x, weight, d_y = random(2, 20, 12, dtype=dtype), random(12, 8, seed=1), random(2, 20, 8, seed=2, dtype=dtype)

    def plain(x, weight):
        return x.astype(jnp.float32) @ weight.astype(dtype).astype(jnp.float32)

    y, vjp = jax.vjp(jax.jit(linear), x, weight)
    wanted, wanted_vjp = jax.vjp(plain, x, weight)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    assert y.dtype == dtype
    np.testing.assert_allclose(np.asarray(y, np.float32), wanted, rtol=tolerance, atol=tolerance)
    (d_x, d_weight), (wanted_x, wanted_weight) = vjp(d_y), wanted_vjp(d_y.astype(jnp.float32))
    assert (d_x.dtype, d_weight.dtype) == (dtype, jnp.float32)
    np.testing.assert_allclose(*(np.asarray(d, np.float32) for d in (d_x, wanted_x)), rtol=tolerance, atol=tolerance)
    # the sum over rows is in float32 and is not rounded to bfloat16 afterwards
    exact = np.einsum("btk,btn->kn", np.asarray(x, np.float64), np.asarray(d_y, np.float64))
    np.testing.assert_allclose(d_weight, exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_weight, wanted_weight, rtol=tolerance, atol=tolerance)
