"""Experts that are spread over devices: every device's tokens reach all of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxllm.model.dtypes import Array
from jaxllm.model.kernels.expert_ffn import ExpertOutput
from jaxllm.model.kernels.matmul import save_for_backward
from jaxllm.model.kernels.token_dispatch import Dispatch, plan_dispatch


def expert_parallel_ffn(
    local_ffn: Callable[[Array, Array, Dispatch], ExpertOutput],
    tokens: Float[Array, "N D"],
    gates: Float[Array, "N k"],
    experts: Int[Array, "N k"],
    local_experts: int,
) -> ExpertOutput:
    """The output of the routed experts of all devices along `expert` for this device's tokens.

    Every device gathers the tokens of the others, runs the rows for which its experts were chosen, and the results are
    summed over the devices. No token is dropped, whatever the imbalance: every device has room for all rows. Exchanging
    only the chosen rows would move k/n of this on n > k devices.

    Args:
        local_ffn: this device's experts, on the tokens and gates of all n devices and their plan: (nN,D), (nN,k).
        gates, experts: the router's choice for the tokens among all experts.
        local_experts: how many experts a device has.
    """

    def gather(x: Array) -> Array:
        return save_for_backward(jax.lax.all_gather(x, "expert", tiled=True))

    local = gather(experts) - jax.lax.axis_index("expert") * local_experts
    plan = plan_dispatch(jnp.where(local < 0, local_experts, local), local_experts)
    output, saved = local_ffn(gather(tokens), gather(gates), plan)
    return ExpertOutput(jax.lax.psum_scatter(output, "expert", tiled=True), saved)
