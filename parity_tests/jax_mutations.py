"""Planted faults of the Flax side: where the code takes another way with more tokens, other options or less precision.

Each is traced anew, so a ladder that has run before does not see it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

import jaxllm.model.kernels as kernels
from jaxllm.model import decoder, decoding, layer_loop, layers, moe
from jaxllm.model.batch import IGNORED
from jaxllm.model.kernels import causal_attention, grouped_loop, rms_norm
from jaxllm.train import loss, step
from parity_tests import training_rungs
from parity_tests.mutations import Mutation

JAX_MUTATIONS: dict[str, Mutation] = {}

BFLOAT16_MUTATIONS: dict[str, Mutation] = {}
"""Faults of a model that computes in bfloat16: something there loses its float32."""


def _mutation(rung: str, what: str, known: dict[str, Mutation] = JAX_MUTATIONS) -> Callable[[Callable], Callable]:
    """Register a generator function as a context manager, around which JAX forgets what it traced."""

    def register(function: Callable) -> Callable:
        @contextmanager
        @functools.wraps(function)
        def plant(model: Any = None) -> Iterator[None]:
            jax.clear_caches()
            try:
                with contextmanager(function)():
                    yield
            finally:
                jax.clear_caches()

        known[function.__name__] = Mutation(plant, rung, what)
        return plant

    return register


@contextmanager
def _replaced(owner: Any, name: str, change: Callable[..., Any]) -> Iterator[None]:
    """`owner.name(*args)` is `change(owner.name, *args)`."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def changed(*args: Any, **kwargs: Any) -> Any:
        return change(original, *args, **kwargs)

    with mock.patch.object(owner, name, changed):
        yield


def _bfloat16(x: jax.Array) -> jax.Array:
    """Rounded to bfloat16, which the compiler may not leave out."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


# beyond a threshold of the code


@_mutation("gradients", "gradients")
def later_queries_give_keys_no_gradient() -> Iterator[None]:
    """Only the first block of queries contributes to the gradient of the keys."""

    def attend(original, end, k, v, mask, start, q):
        return original(end, jnp.where(start > 0, jax.lax.stop_gradient(k), k), v, mask, start, q)

    with _replaced(causal_attention, "_attend", attend):
        yield


@_mutation("gradients", "gradients")
def later_chunks_give_no_gradient() -> Iterator[None]:
    """Only the first chunk of the loss has a gradient."""

    def scan(original, *args, chunk_rows, **kwargs):
        value, grads = original(*args, chunk_rows=chunk_rows, **kwargs)
        return value, grads and (grads[0].at[chunk_rows:].set(0), *grads[1:])

    with _replaced(loss, "_scan_chunks", scan):
        yield


@_mutation("gradients", "training loss")
def third_micro_batch_lost() -> Iterator[None]:
    """The third micro-batch, and each after it, is the first one again."""

    def gradients(original, optim, graph, state, batch, *rest, **kwargs):
        return original(optim, graph, state, jax.tree.map(lambda x: x.at[2:].set(x[:1]), batch), *rest, **kwargs)

    with _replaced(step, "gradients", gradients):
        yield


@_mutation("gradients", "training loss, one expert for all")
def large_groups_cut() -> Iterator[None]:
    """Of an expert's rows, one block is computed."""

    def loop(original, sizes, e, start, end, block, carry):
        return original(sizes, e, start, jnp.minimum(end, start + (end - start - 1) % sizes[-1] + 1), block, carry)

    with _replaced(grouped_loop, "_loop_blocks", loop):
        yield


@_mutation("generation", "cached logits")
def late_positions_decoded_alike() -> Iterator[None]:
    """Positions beyond three quarters of the table are decoded as the last one before."""

    def decode(original, self, token, positions, cache):
        return original(self, token, jnp.minimum(positions, self.config.max_position_embeddings * 3 // 4), cache)

    with _replaced(decoder.CustomLLM, "decode", decode):
        yield


# other options, inputs and settings


@_mutation("padding", "padded logits")
def padding_ignored() -> Iterator[None]:
    """Attention in JAX sees padding."""
    with _replaced(kernels, "blocked_attention", lambda original, q, k, v, mask, scale: original(q, k, v, None, scale)):
        yield


@_mutation("evaluation", "evaluation loss")
def documents_see_each_other() -> Iterator[None]:
    """Attention in JAX sees earlier documents of the row."""

    def attend(original, q, k, v, mask, scale):
        return original(q, k, v, None if mask is None else mask > 0, scale)

    with _replaced(kernels, "blocked_attention", attend):
        yield


@_mutation("evaluation", "evaluation loss")
def a_target_not_evaluated() -> Iterator[None]:
    """The evaluation leaves out the first target of each row."""

    def evaluate(original, graph, params, bias, batch, *rest):
        return original(graph, params, bias, batch._replace(targets=batch.labels.at[:, 1].set(IGNORED)), *rest)

    with _replaced(step, "eval_step", evaluate):
        yield


@_mutation("gradients", "gradients")
def balance_loss_doubled() -> Iterator[None]:
    with _replaced(decoder, "balance_loss", lambda original, *args: 2 * original(*args)):
        yield


@_mutation("gradients", "gradients")
def z_loss_not_squared() -> Iterator[None]:
    with _replaced(decoder, "z_loss", lambda original, *args: jnp.sqrt(original(*args))):
        yield


@_mutation("gradients", "gradients")
def remat_loses_gradient() -> Iterator[None]:
    """Where a layer is computed again, a tenth of the gradient of its input is lost."""

    def checkpoint(original, layer, remat):
        def losing(*args):
            *others, x = args
            return layer(*others, x + 0.1 * (jax.lax.stop_gradient(x) - x))

        return original(losing if remat else layer, remat)

    with _replaced(layer_loop, "checkpoint", checkpoint):
        yield


@_mutation("step", "first moments, norm below the limit")
def clip_always() -> Iterator[None]:
    """Gradients are scaled to the limit, also where their norm is below it."""

    def clip(original, grads, norm, limit):
        return jax.tree.map(lambda grad: grad * (limit / (norm + 1e-6)), grads)

    with _replaced(step, "clip_gradients", clip):
        yield


@_mutation("step", "update")
def rate_follows_all_steps() -> Iterator[None]:
    """The learning rate and the correction of the moments count steps that were not finite, too."""

    def counted(original, optim, graph, state, *rest):
        counts = state.opt_state._replace(count=state.step)
        return original(optim, graph, state._replace(opt_state=counts), *rest)

    with _replaced(step, "train_step", counted):
        yield


@_mutation("step", "expert load")
def load_of_an_even_layer() -> Iterator[None]:
    """The load that is reported is that of an even layer."""

    def measured(original, **metrics):
        return original(**metrics | {"expert_load": jnp.minimum(metrics["expert_load"], 1.0)})

    with _replaced(step, "StepMetrics", measured):
        yield


@contextmanager
def _rates(change: Callable[..., Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for owner in (step, training_rungs):
            stack.enter_context(_replaced(owner, "learning_rate", change))
        yield


@_mutation("trajectory", "parameters")
def decay_ends_early() -> Iterator[None]:
    """The rate of the last step is 0: no loss shows it."""

    def rate(original, numbers, count):
        steps = numbers.falls_from + 1 / numbers.per_falling_step
        return jnp.where(count > steps - 1.5, 0.0, original(numbers, count))

    with _rates(rate):
        yield


@_mutation("trajectory", "losses")
def warmup_of_none_starts_at_zero() -> Iterator[None]:
    """Without a warm-up the first update has the rate 0."""

    def rate(original, numbers, count):
        return jnp.where((numbers.warmup_steps == 0) & (count == 0), 0.0, original(numbers, count))

    with _rates(rate):
        yield


@_mutation("generation", "end of text")
def token_before_the_end_lost() -> Iterator[None]:
    def before(original, tokens, ends):
        kept = original(tokens, ends)
        return kept[:-1] if len(kept) < len(tokens) else kept

    with _replaced(decoding, "_before_end", before):
        yield


# float32 lost in a bfloat16 model


@_mutation("parts", "router logits", BFLOAT16_MUTATIONS)
def router_in_bfloat16() -> Iterator[None]:
    def narrow(original, x, weight, *args, compute_dtype=None):
        dtype = None if compute_dtype is None else jnp.bfloat16
        return original(x, weight, *args, compute_dtype=dtype).astype(jnp.float32 if compute_dtype else x.dtype)

    with _replaced(moe, "linear", narrow):
        yield


@_mutation("parts", "router scores", BFLOAT16_MUTATIONS)
def scores_in_bfloat16() -> Iterator[None]:
    with _replaced(jax.nn, "sigmoid", lambda original, x: _bfloat16(original(x)) if x.ndim == 2 else original(x)):
        yield


@_mutation("parts", "gates", BFLOAT16_MUTATIONS)
def gates_in_bfloat16() -> Iterator[None]:
    def route(original, *args):
        routing = original(*args)
        return routing._replace(gates=_bfloat16(routing.gates))

    with _replaced(moe, "route", route):
        yield


@_mutation("parts", "input norm", BFLOAT16_MUTATIONS)
def norm_in_bfloat16() -> Iterator[None]:
    def normed(original, eps, x):
        values, inverse = original(eps, x)
        return _bfloat16(values), inverse

    with _replaced(rms_norm, "_normed", normed):
        yield


@_mutation("parts", "attention", BFLOAT16_MUTATIONS)
def softmax_in_bfloat16() -> Iterator[None]:
    with _replaced(causal_attention, "masked_softmax", lambda original, x, mask: original(_bfloat16(x), mask)):
        yield


@_mutation("parts", "rotated keys", BFLOAT16_MUTATIONS)
def rotary_angles_in_bfloat16() -> Iterator[None]:
    def rotate(original, self, x, positions):
        with ExitStack() as stack:
            for name in ("cos", "sin"):
                stack.enter_context(_replaced(jnp, name, lambda function, angles: function(_bfloat16(angles))))
            return original(self, x, positions)

    with _replaced(layers.RotaryEmbedding, "__call__", rotate):
        yield


@_mutation("parts", "logits", BFLOAT16_MUTATIONS)
def logits_in_bfloat16() -> Iterator[None]:
    with _replaced(decoder, "linear", lambda original, *args: _bfloat16(original(*args))):
        yield
