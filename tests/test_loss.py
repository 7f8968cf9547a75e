"""Cross-entropy in chunks against the plain formula, and the one shift of the labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.train import loss


def plain(hidden, weight, bias, targets):
    log_p = jax.nn.log_softmax(hidden @ weight + bias)
    scored = targets != loss.IGNORED
    return -jnp.where(scored, jnp.take_along_axis(log_p, jnp.where(scored, targets, 0)[:, None], 1)[:, 0], 0).sum()


@pytest.mark.parametrize("rows", [64, 7], ids=["one chunk", "chunks with a remainder"])
def test_equals_the_plain_formula_with_gradients(rows, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ROWS", rows)
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 4)
        args = (
            jax.random.normal(keys[0], (50, 8)),
            jax.random.normal(keys[1], (8, 30)),
            jax.random.normal(keys[2], (30,)),
        )
        targets = jax.random.randint(keys[3], (50,), 0, 30).at[::5].set(loss.IGNORED)
        ours, our_grads = jax.value_and_grad(lambda *a: 3 * loss.summed_cross_entropy(*a, targets), (0, 1, 2))(*args)
        theirs, their_grads = jax.value_and_grad(lambda *a: 3 * plain(*a, targets), (0, 1, 2))(*args)
        assert float(3 * loss.summed_cross_entropy(*args, targets)) == pytest.approx(float(theirs), rel=1e-13)
        assert float(ours) == pytest.approx(float(theirs), rel=1e-13)
        for a, b in zip(our_grads, their_grads, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


def test_a_gpu_s_form_computes_the_same():
    """Larger chunks, each row's sum in one pass, and no scatter: other orders of addition, and the same numbers."""
    keys = jax.random.split(jax.random.key(2), 3)
    hidden = jax.random.normal(keys[0], (50, 8), jnp.bfloat16)
    weight, bias = jax.random.normal(keys[1], (8, 30)), jnp.ones(30)
    targets = jax.random.randint(keys[2], (50,), 0, 30).at[::5].set(loss.IGNORED)
    arguments = (hidden, weight, bias, targets)
    scattered, selected, larger = (
        loss._scan_chunks(*arguments, grads="all", chunk_rows=rows, for_gpu=for_gpu)
        for rows, for_gpu in ((16, False), (16, True), (32, True))
    )
    for wanted, *others in zip(*map(jax.tree.leaves, (scattered, selected, larger)), strict=True):
        for made in others:
            np.testing.assert_allclose(
                np.asarray(made, np.float32), np.asarray(wanted, np.float32), rtol=1e-5, atol=1e-5
            )


def test_one_pass_over_a_row_overflows_nothing():
    rows = jnp.asarray([[1e4, -1e4, 9.9e3, 1e4], [-3e38, -3e38, 3e38, 0.0], [0.0, 1.0, 2.0, 3.0]])
    largest, total = loss._largest_and_sum_of_exps(rows)
    np.testing.assert_array_equal(largest, rows.max(axis=1))
    np.testing.assert_allclose(total, [2, 1, np.exp([-3.0, -2, -1, 0]).sum()], rtol=1e-6)


def test_large_logits_overflow_nothing():
    """Of 1e4 and more: exp() of one alone is infinite."""
    hidden = jnp.asarray([[1e4, 0.0], [0.0, 1e4], [-1e4, 1e4], [1e4, 1e4]])
    weight, bias = jnp.asarray([[1.0, -1, 0.5], [0.0, 1, 0.5]]), jnp.asarray([1e4, -1e4, 0.0])
    targets = jnp.asarray([0, 0, 2, loss.IGNORED])
    ours, our_grads = jax.value_and_grad(loss.summed_cross_entropy, (0, 1, 2))(hidden, weight, bias, targets)
    theirs, their_grads = jax.value_and_grad(plain, (0, 1, 2))(hidden, weight, bias, targets)
    assert np.isfinite(float(ours))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    for a, b in zip(our_grads, their_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_bfloat16_rounds_the_products_only():
    keys = jax.random.split(jax.random.key(1), 3)
    hidden = jax.random.normal(keys[0], (50, 64), jnp.bfloat16)
    weight = 0.1 * jax.random.normal(keys[1], (64, 300))
    targets = jax.random.randint(keys[2], (50,), 0, 300).at[::5].set(loss.IGNORED)
    args = (hidden, weight, jnp.zeros(300), targets)
    ours, our_grads = jax.value_and_grad(loss.summed_cross_entropy, (0, 1, 2))(*args)
    theirs, their_grads = jax.value_and_grad(plain, (0, 1, 2))(hidden.astype(jnp.float32), *args[1:])
    assert float(ours) == pytest.approx(float(theirs), rel=2e-3)
    for a, b in zip(our_grads, their_grads, strict=True):
        difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
        assert np.linalg.norm(difference) < 8e-3 * np.linalg.norm(np.asarray(b, np.float64))  # roundoff: 4e-3


def test_labels_are_shifted_once():
    labels = jnp.asarray([[5, 6, 7], [8, loss.IGNORED, 9]])
    assert loss.next_token_targets(labels).tolist() == [[6, 7, -100], [-100, 9, -100]]
    assert loss.count_targets(labels) == 3


def test_nothing_to_score_is_zero():
    zero = loss.summed_cross_entropy(jnp.ones((3, 2)), jnp.ones((2, 5)), jnp.ones((5,)), jnp.full((3,), loss.IGNORED))
    assert float(zero) == 0.0
