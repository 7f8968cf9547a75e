"""DeepSeekMoE (arXiv:2401.06066) with the routers of DeepSeek-V2 (arXiv:2405.04434, 2.2) and of DeepSeek-V3, whose
choice a bias steers (arXiv:2412.19437, 2.1.2).

Routing and experts are separate functions, so that a test can call one alone or inject a routing. No token is ever
dropped.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import ModelConfig, RouterConfig
from jaxllm.model.dtypes import Array, at_least_float32
from jaxllm.model.kernels import choose_kernels
from jaxllm.model.kernels.dispatch import Dispatch, add_all, plan_dispatch, single_group
from jaxllm.model.kernels.expert_ffn import expert_ffn, expert_ffn_in_stack
from jaxllm.model.kernels.matmul import keep, linear
from jaxllm.model.kernels.stacks import Carried, Weights
from jaxllm.model.kernels.swiglu import plain_swiglu
from jaxllm.model.layers import Linear, RoutingBias, parameter, stack
from jaxllm.model.layout import ONE_DEVICE, Layout

CUSTOMLLM_ROUTER = RouterConfig()


class Routing(NamedTuple):
    experts: Array  # (N,k) int32, the chosen experts
    gates: Array  # (N,k), their weights
    scores: Array  # (N,E), without the bias
    logits: Array  # (N,E)


class InStack(NamedTuple):
    """Where a layer's experts are, if they are read in place from the stack of all layers."""

    offset: Array  # () int, the first of them
    experts: int  # how many they are
    carried: Carried
    recompute: bool = False  # see `expert_ffn_in_stack`


InStacks = Mapping[str, InStack]
"""Of the attributes of DeepSeekMoE whose weights are such a stack."""


class OfExperts(NamedTuple):
    output: Array  # (N,D)
    carried: Carried | None  # for the next layer; None: no stack of all layers


class Mixture(NamedTuple):
    output: Array  # (B,T,D), shared and routed experts summed
    routing: Routing | None  # of the N tokens; None: a dense layer
    carried: dict[str, Carried]  # for the next layer, of each of `InStacks`


def route(
    x: Array,
    router_weight: Array,
    routing_bias: Array | None,
    experts_per_token: int,
    experts: Array | None = None,
    router: RouterConfig = CUSTOMLLM_ROUTER,
) -> Routing:
    """Choose experts by rank, weigh them by score, all in float32: x (N,D), (D,E), (E,) or None, k.

    `experts` (N,k) are used instead of the k best ranked (ties: lowest index).
    """
    acc_dtype = at_least_float32(x.dtype)
    logits = linear(x, router_weight, compute_dtype=acc_dtype)
    scores = jax.nn.sigmoid(logits) if router.scoring_func == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    if experts is None:
        ranks = jax.lax.stop_gradient(scores)
        if routing_bias is not None:
            ranks += routing_bias.astype(acc_dtype)
        _, experts = jax.lax.top_k(close_groups(ranks, router), experts_per_token)
    gates = jnp.take_along_axis(scores, experts, axis=-1)
    if router.norm_topk_prob:
        gates = gates / (gates.sum(axis=-1, keepdims=True) + 1e-20)
    return Routing(experts, gates * router.routed_scaling_factor, scores, logits)


def close_groups(ranks: Array, router: RouterConfig) -> Array:
    """Ranks (N,E) in which only the experts of the `topk_group` best groups can be chosen (arXiv:2412.19437, 2.1.2)."""
    if router.n_group == router.topk_group:
        return ranks
    grouped = ranks.reshape(ranks.shape[0], router.n_group, -1)  # (N,groups,E/groups)
    best = jax.lax.top_k(grouped, 2 if router.has_bias else 1)[0].sum(axis=-1)  # (N,groups)
    _, chosen = jax.lax.top_k(best, router.topk_group)
    is_open = (chosen[..., None] == jnp.arange(router.n_group)).any(axis=1)  # (N,groups)
    return jnp.where(is_open[..., None], grouped, -jnp.inf if router.has_bias else 0).reshape(ranks.shape)


class DeepSeekExpertLayer(nnx.Module):
    """A SwiGLU feed-forward layer. The shared and the routed experts are stacks of it along a leading axis.

    Alone, with a hidden size that is given, it is the feed-forward network of a dense layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        platform: str | None = None,
        hidden: int | None = None,
    ):
        self.dtype, self.kernels = dtype, choose_kernels(config, dtype, platform)
        D, F, std = config.hidden_size, hidden or config.moe_intermediate_size, config.initializer_range
        self.gate_proj = Linear(D, F, ("hidden", "expert_hidden"), std=std, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(D, F, ("hidden", "expert_hidden"), std=std, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(F, D, ("expert_hidden", "hidden"), std=std, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:  # (..., D) -> (..., D)
        return self.down_proj(plain_swiglu(self.gate_proj(x), self.up_proj(x)))

    def weights(self) -> Weights:
        return self.gate_proj.weight[...], self.up_proj.weight[...], self.down_proj.weight[...]

    def routed(self, x: Array, gates: Array, plan: Dispatch, in_stack: InStack | None = None) -> OfExperts:
        """As a stack of experts of which each token has chosen some: see `expert_ffn`, (N,D), (N,k) -> (N,D).

        With `in_stack`, the module's weights are those of all layers as `prepare` makes them.
        """
        x = x.astype(self.dtype)
        if in_stack is None:
            return OfExperts(expert_ffn(self.kernels.grouped, x, gates, self.weights(), plan), None)
        offset, _, carried, recompute = in_stack
        made: Any = expert_ffn_in_stack(
            self.kernels.grouped, recompute, x, gates, self.weights(), carried, plan, offset
        )
        return OfExperts(*made)

    def summed(self, x: Array, in_stack: InStack | None = None) -> OfExperts:
        """As a stack of experts that all see every token, summed: (N,D) -> (N,D). `in_stack` as in `routed`."""
        x = x.astype(self.dtype)
        if in_stack is None:
            weights = zip(*self.weights(), strict=True)
            out = add_all(linear(plain_swiglu(linear(x, gate), linear(x, up)), down) for gate, up, down in weights)
            return OfExperts(out, None)
        assert self.kernels.shared is not None
        ones, plan = jnp.ones((len(x), 1), at_least_float32(self.dtype)), single_group(len(x))
        outputs, (offset, experts, carried, _) = [], in_stack
        for j in range(experts):
            made: Any = expert_ffn_in_stack(
                self.kernels.shared, False, x, ones, self.weights(), carried, plan, offset + j
            )
            output, carried = made
            outputs.append(output)
        return OfExperts(add_all(outputs), carried)


class DeepSeekMoE(nnx.Module):
    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs, platform: str | None = None):
        self.config = config
        D, E = config.hidden_size, config.n_routed_experts

        def expert(rngs: nnx.Rngs) -> DeepSeekExpertLayer:
            return DeepSeekExpertLayer(config, dtype=dtype, rngs=rngs, platform=platform)

        self.shared_experts = stack(expert, config.n_shared_experts, "shared_expert", rngs)
        self.routed_experts = stack(expert, E, "expert", rngs)
        self.router = Linear(
            D, E, ("hidden", "score"), is_hidden=False, std=config.initializer_range, dtype=dtype, rngs=rngs
        )
        zeros = jnp.zeros((E,), at_least_float32(dtype))
        bias = parameter(zeros, ("score",), decays=False, kind=RoutingBias)
        self.routing_bias = bias if config.router.has_bias else None

    def __call__(
        self, x: Array, experts: Array | None = None, layout: Layout = ONE_DEVICE, in_stacks: InStacks | None = None
    ) -> Mixture:
        """Shared experts for every token and k routed ones: x (B,T,D).

        Args:
            experts: (B, T, k) experts to use instead of the router's choice.
            layout: with several devices along `expert`, `routed_experts` are those of this device.
            in_stacks: where the layer's experts are, of `routed_experts` or also `shared_experts`, if their weights are
                those of all layers.
        """
        tokens = x.reshape(-1, x.shape[-1])  # (N,D)
        if experts is not None:
            experts = experts.reshape(tokens.shape[0], -1)
        bias = None if self.routing_bias is None else self.routing_bias[...]
        k, router = self.config.num_experts_per_tok, self.config.router
        routing = route(tokens, self.router.weight[...], bias, k, experts, router)
        stacks = in_stacks or {}
        run = functools.partial(self.routed_experts.routed, in_stack=stacks.get("routed_experts"))
        if layout.expert > 1:
            local = self.config.n_routed_experts // layout.expert
            mixed, carried = expert_parallel_ffn(run, tokens, routing, local)
        else:
            plan = plan_dispatch(routing.experts, self.config.n_routed_experts)
            mixed, carried = run(tokens, routing.gates, plan=plan)  # nnx.tabulate needs names for tuples
        shared, shared_carried = self.shared_experts.summed(tokens, in_stack=stacks.get("shared_experts"))
        handed_on = {"routed_experts": carried, "shared_experts": shared_carried}
        there = {name: carried for name, carried in handed_on.items() if carried is not None}
        return Mixture((shared + mixed).reshape(x.shape), routing, there)


def expert_parallel_ffn(
    run: Callable[..., OfExperts], tokens: Array, routing: Routing, local_experts: int
) -> OfExperts:
    """The output of the routed experts of all devices along `expert` for this device's tokens: (N,D) -> (N,D).

    Every device gathers the tokens of the others, runs the rows for which its experts were chosen, and the results are
    summed over the devices. No token is dropped, whatever the imbalance: every device has room for all rows. Exchanging
    only the chosen rows would move k/n of this on n > k devices.

    Args:
        run: this device's experts, on the tokens and gates of all devices and their plan: (nN,D), (nN,k) -> (nN,D).
        routing: of the tokens, among all experts.
        local_experts: how many experts a device has.
    """

    def gather(x: Array) -> Array:
        return keep(jax.lax.all_gather(x, "expert", tiled=True))

    local = gather(routing.experts) - jax.lax.axis_index("expert") * local_experts
    plan = plan_dispatch(jnp.where(local < 0, local_experts, local), local_experts)
    out, carried = run(gather(tokens), gather(routing.gates), plan=plan)
    return OfExperts(jax.lax.psum_scatter(out, "expert", tiled=True), carried)


def balance_loss(routing: Routing, batch: int) -> Array:
    """DeepSeek-V3's complementary sequence-wise balance loss (arXiv:2412.19437, eq. 17-20), without its weight.

    1 where every sequence spreads its tokens evenly, larger otherwise; the mean over the batch's sequences.
    """
    E = routing.scores.shape[-1]
    k = routing.experts.shape[-1]
    chosen = (routing.experts[..., None] == jnp.arange(E)).sum(axis=1)  # (N,E)
    fraction = chosen.reshape(batch, -1, E).mean(axis=1) * (E / k)
    normalized = routing.scores / (routing.scores.sum(axis=-1, keepdims=True) + 1e-20)
    return (fraction * normalized.reshape(batch, -1, E).mean(axis=1)).sum(axis=-1).mean()


def z_loss(routing: Routing) -> Array:
    """Router z-loss (ST-MoE, arXiv:2202.08906, eq. 5), without its weight: keeps router logits small."""
    return jnp.square(jax.nn.logsumexp(routing.logits, axis=-1)).mean()


def updated_routing_bias(bias: Array, counts: Array, rate: float) -> Array:
    """Auxiliary-loss-free load balancing (arXiv:2408.15664): push the choice away from crowded experts.

    bias (..., E), counts (..., E) of each expert's tokens over the whole global batch, and the step gamma -> (..., E).
    """
    counts = counts.astype(bias.dtype)
    return bias + rate * jnp.sign(counts.mean(axis=-1, keepdims=True) - counts)
