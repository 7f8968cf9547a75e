"""The matrix product: its values and gradients in every form, whatever a CPU needs for bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.model.kernels.matmul import FEW_ROWS, linear, matmul


def random(*shape: int, seed: int = 0, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@pytest.mark.parametrize("lead", [(), (3,)], ids=["one", "a batch"])
@pytest.mark.parametrize("rows", [1, FEW_ROWS, 40])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True)], ids=str)
def test_bfloat16_products_are_exact_to_their_result_s_rounding(lead, rows, transposed):
    a, b = random(*lead, rows, 48, dtype=jnp.bfloat16), random(*lead, 48, 24, seed=1, dtype=jnp.bfloat16)

    @jax.jit
    def product(a, b):
        a, b = (x.mT if swap else x for x, swap in zip((a, b), transposed, strict=True))
        return matmul(a, b), matmul(a, b, jnp.float32)

    narrow, wide = product(*(x.mT if swap else x for x, swap in zip((a, b), transposed, strict=True)))
    assert (narrow.dtype, wide.dtype) == (jnp.bfloat16, jnp.float32)
    wanted = np.matmul(np.asarray(a, np.float64), np.asarray(b, np.float64))
    np.testing.assert_allclose(wide, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.asarray(narrow, np.float32), wanted, rtol=2**-8, atol=1e-2)


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
