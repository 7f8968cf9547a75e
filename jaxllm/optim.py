"""AdamW with global-norm clipping, and the source's schedule: linear warm-up, then a half cosine to zero."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm.config import TrainConfig


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate of the update number `count` (from 0): linear from 0 over `warmup_steps`, cosine to 0 at `steps`.

    It is written here because optax's cosine joins a warm-up with a peak of its own rounding; the formula is that of
    transformers' `get_cosine_schedule_with_warmup`, whose values the source's log shows.
    """

    def schedule(count):
        count = jnp.asarray(count, jnp.promote_types(jnp.float32, jnp.result_type(float)))
        warmup = count / max(1, config.warmup_steps)
        progress = (count - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
        return config.learning_rate * jnp.where(count < config.warmup_steps, warmup, cosine)

    return schedule


def decays(params) -> dict:
    """Which parameters weight decay applies to: matrices and embeddings, not norms and biases (as in the Trainer)."""

    def is_matrix(path, _leaf) -> bool:
        names = [str(getattr(key, "key", key)) for key in path]
        return names[-1] == "weight" and not any(name.endswith("norm") for name in names)

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale all gradients by `min(1, max_norm / (norm + 1e-6))`, as torch.nn.utils.clip_grad_norm_ does.

    optax's own transformation lacks PyTorch's 1e-6. It also divides every element: XLA will not repeat a division in
    each place that reads it, and so keeps a second copy of all gradients (4 GiB for customllm-1b).
    """

    def update(grads, state, params=None):
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(grads) + 1e-6))
        return jax.tree.map(lambda grad: grad * factor, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` by its own functions, whose moments stay what they were where `finite` is false.

    The updates come from the moments that are kept. Chosen behind optax's update, old and new moments would both have
    to be in memory: 4 GiB more for customllm-1b.
    """

    def update(grads, state, params=None, *, finite, **extra):
        del params, extra
        new = optax.ScaleByAdamState(
            count=state.count + 1,
            mu=optax.tree.update_moment(grads, state.mu, b1, 1),
            nu=optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2),
        )
        kept = choose(finite, new, state)
        count = jnp.maximum(kept.count, 1)
        mu, nu = optax.tree.bias_correction(kept.mu, b1, count), optax.tree.bias_correction(kept.nu, b2, count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu), kept

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam(b1, b2, eps).init, update)


def scale_by_learning_rate(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate`, whose count stays what it was where `finite` is false."""
    inner = optax.scale_by_learning_rate(schedule)

    def update(updates, state, params=None, *, finite, **extra):
        del extra
        updates, new = inner.update(updates, state, params)
        return updates, choose(finite, new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def choose(finite: jax.Array, new: Any, old: Any) -> Any:
    """A pytree where `finite`, or else the other. No product: zero times what is not finite is not zero."""
    return jax.tree.map(lambda one, other: jnp.where(finite, one, other), new, old)


def optimizer(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """Clipping, AdamW moments in float32, decoupled decay, schedule: in the order of PyTorch's AdamW.

    Its update wants `finite`, a () bool: whether the state shall change.
    """
    return optax.chain(
        clip_by_global_norm(config.max_grad_norm),
        scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.adam_eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        scale_by_learning_rate(learning_rate_schedule(config)),
    )


class AdamMoments(NamedTuple):
    """What AdamW remembers of the updates before."""

    count: Any  # () int32, updates done
    mu: Any  # first moments, a pytree like the parameters
    nu: Any  # second moments, likewise


def adam_moments(opt_state: optax.OptState) -> AdamMoments:
    """Read the moments out of a state of `optimizer`."""
    adam = next(state for state in opt_state if isinstance(state, optax.ScaleByAdamState))
    return AdamMoments(*adam)


def with_moments(opt_state: optax.OptState, moments: AdamMoments) -> optax.OptState:
    """A state of `optimizer` that has come to these moments; the schedule has come as far as they have."""
    replaced = {
        optax.ScaleByAdamState: optax.ScaleByAdamState(*moments),
        optax.ScaleByScheduleState: optax.ScaleByScheduleState(jnp.array(moments.count)),  # a copy: both are donated
    }
    return tuple(replaced.get(type(state), state) for state in opt_state)
