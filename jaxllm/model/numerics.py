"""JAX's settings that change numbers, fixed for a run: environment variables and other libraries do not change them."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import jax

from jaxllm.errors import UserError
from jaxllm.model.dtypes import Array

KEY_IMPL = "threefry2x32"
"""Of all random keys."""

PINNED: dict[str, Any] = {
    "jax_default_prng_impl": KEY_IMPL,
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_softmax_custom_jvp": False,
    "jax_enable_x64": False,
    "jax_default_matmul_precision": None,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_disable_most_optimizations": False,
}
"""JAX's defaults, with which runs were trained."""


def random_key(seed: int) -> Array:
    return jax.random.key(seed, impl=KEY_IMPL)


def pin_numerics() -> None:
    """Apply the settings of `PINNED` to this process. One line on stderr names those that differed.

    Raises:
        UserError: jit is disabled.
    """
    present = jax.config.values
    if present["jax_disable_jit"]:
        raise UserError("JAX_DISABLE_JIT is set: this program needs jax.jit, unset it")
    replaced = []
    for name, value in PINNED.items():
        before = getattr(present.get(name, value), "value", present.get(name, value))  # of an enum
        if before != value:
            jax.config.update(name, value)
            replaced.append(f"{name.upper()}={before} (here: {value})")
    if replaced:
        print(f"Not used, because they change numbers: {', '.join(replaced)}", file=sys.stderr)


@contextlib.contextmanager
def pinned_sampling() -> Iterator[None]:
    """Within it, random numbers and broadcasting are as `pin_numerics` sets them: for functions of the library.

    The precision is the caller's.
    """
    with jax.threefry_partitionable(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
