"""DeepSeekMoE (arXiv:2401.06066) with the routers of DeepSeek-V2 (arXiv:2405.04434, 2.2) and of DeepSeek-V3, whose
choice a bias steers (arXiv:2412.19437, 2.1.2).

Routing and experts are separate functions, so that a test can call one alone or inject a routing. No token is dropped.

An expert's gradient reaches the optimizer through the layer loop (`jaxllm.model.layer_loop`): its backward pass gives
each layer the gradient arrays of all layers (gate, up, down), and `jaxllm.model.kernels.expert_ffn` writes its part.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from jaxllm.config import ModelConfig, RouterConfig
from jaxllm.model.dtypes import Array, at_least_float32
from jaxllm.model.expert_parallel import expert_parallel_ffn
from jaxllm.model.kernels import Kernels
from jaxllm.model.kernels.expert_ffn import ExpertOutput, ExpertSlice, expert_ffn, expert_slice
from jaxllm.model.kernels.interface import Adapters, Weights
from jaxllm.model.kernels.matmul import linear
from jaxllm.model.kernels.swiglu import plain_swiglu
from jaxllm.model.kernels.token_dispatch import Dispatch, add_all, every_token, plan_dispatch
from jaxllm.model.layers import Frozen, Linear, RoutingBias, member, parameter, stack
from jaxllm.model.layout import ONE_DEVICE, Layout

CUSTOMLLM_ROUTER = RouterConfig()

ExpertSlices = Mapping[str, ExpertSlice]
"""The experts of one layer, by the attribute of DeepSeekMoE: those that the kernels read in place."""


class Routing(NamedTuple):
    experts: Int[Array, "N k"]  # the chosen experts
    gates: Float[Array, "N k"]  # their weights
    scores: Float[Array, "N E"]  # without the bias
    logits: Float[Array, "N E"]


class Mixture(NamedTuple):
    output: Float[Array, "B T D"]  # shared and routed experts summed
    routing: Routing | None  # of the N tokens; None: a dense layer
    saved: dict[str, Array | None]  # see `ExpertOutput`, by the attribute of DeepSeekMoE


def route(
    x: Float[Array, "N D"],
    router_weight: Float[Array, "D E"],
    routing_bias: Float[Array, " E"] | None,
    experts_per_token: int,
    experts: Int[Array, "N k"] | None = None,
    router: RouterConfig = CUSTOMLLM_ROUTER,
) -> Routing:
    """Choose experts by rank and weigh them by score, all in float32.

    `experts` are used instead of the k best ranked (ties: lowest index).
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


def close_groups(ranks: Float[Array, "N E"], router: RouterConfig) -> Float[Array, "N E"]:
    """Ranks in which only the experts of the `topk_group` best groups can be chosen (arXiv:2412.19437, 2.1.2)."""
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

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs, hidden: int | None = None):
        D, F, std = config.hidden_size, hidden or config.moe_intermediate_size, config.initializer_range
        self.gate_proj = Linear(D, F, ("hidden", "expert_hidden"), std=std, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(D, F, ("hidden", "expert_hidden"), std=std, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(F, D, ("expert_hidden", "hidden"), std=std, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return self.down_proj(plain_swiglu(self.gate_proj(x), self.up_proj(x)))

    def weights(self) -> Weights:
        """gate, up (D,F) and down (F,D); of a stack of E, with E in front."""
        return self.gate_proj.weight[...], self.up_proj.weight[...], self.down_proj.weight[...]

    @property
    def is_frozen(self) -> bool:
        return isinstance(self.gate_proj.weight, Frozen)

    def adapters(self) -> Adapters | None:
        """Those of `weights`, B times the scale; None: there are none."""
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        gate, up, down = (
            one.adapter and (one.adapter.a[...], one.adapter.scale * one.adapter.b[...]) for one in linears
        )
        return None if gate is None or up is None or down is None else (gate, up, down)


class DeepSeekMoE(nnx.Module):
    def __init__(self, config: ModelConfig, *, kernels: Kernels, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config, self.kernels, self.dtype = config, kernels, dtype
        D, E = config.hidden_size, config.n_routed_experts

        def expert(rngs: nnx.Rngs) -> DeepSeekExpertLayer:
            return DeepSeekExpertLayer(config, dtype=dtype, rngs=rngs)

        self.shared_experts = stack(expert, config.n_shared_experts, "shared_expert", rngs)
        self.routed_experts = stack(expert, E, "expert", rngs)
        self.router = Linear(D, E, ("hidden", "score"), std=config.initializer_range, dtype=dtype, rngs=rngs)
        zeros = jnp.zeros((E,), at_least_float32(dtype))
        bias = parameter(zeros, ("score",), decays=False, kind=RoutingBias)
        self.routing_bias = bias if config.router.has_bias else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        forced: Int[Array, "B T k"] | None = None,
        layout: Layout = ONE_DEVICE,
        experts: ExpertSlices | None = None,
    ) -> Mixture:
        """Shared experts for every token and k routed ones.

        Args:
            forced: experts to use instead of the router's choice.
            layout: with several devices along `expert`, the routed experts are those of this device.
            experts: this layer's, in arrays of all layers; None: the weights of this module.
        """
        tokens = x.reshape(-1, x.shape[-1])  # (N,D)
        if forced is not None:
            forced = forced.reshape(tokens.shape[0], -1)
        bias = None if self.routing_bias is None else self.routing_bias[...]
        k, router = self.config.num_experts_per_tok, self.config.router
        routing = route(tokens, self.router.weight[...], bias, k, forced, router)
        experts = self.own_experts() if experts is None else experts
        # keyword arguments: nnx.tabulate cannot show a tuple that is passed by position
        routed = self.routed_ffn(tokens, routing=routing, layout=layout, experts=experts["routed_experts"])
        shared = self.shared_ffn(tokens, experts=experts.get("shared_experts"))
        saved = {"routed_experts": routed.saved, "shared_experts": shared.saved}
        return Mixture((shared.output + routed.output).reshape(x.shape), routing, saved)

    def own_experts(self) -> ExpertSlices:
        kernels = self.kernels.experts
        modules = {name: getattr(self, name) for name in kernels}
        return {
            name: expert_slice(kernels[name], module.weights(), self.dtype, frozen=module.is_frozen)
            for name, module in modules.items()
        }

    def routed_ffn(
        self, x: Float[Array, "N D"], routing: Routing, layout: Layout, experts: ExpertSlice
    ) -> ExpertOutput:
        """The chosen experts of each token, weighed by the gates."""
        experts = experts._replace(adapters=self.routed_experts.adapters())

        def ffn(x: Array, gates: Array, plan: Dispatch) -> ExpertOutput:
            return expert_ffn(self.kernels.routed, x.astype(self.dtype), gates, plan, experts)

        E = self.config.n_routed_experts
        if layout.expert > 1:
            return expert_parallel_ffn(ffn, x, routing.gates, routing.experts, E // layout.expert)
        return ffn(x, routing.gates, plan_dispatch(routing.experts, E))

    def shared_ffn(self, x: Float[Array, "N D"], experts: ExpertSlice | None) -> ExpertOutput:
        """All shared experts, summed. Without kernels for them, `experts` is None."""
        x = x.astype(self.dtype)
        if self.kernels.shared is None or experts is None:
            shared = (member(self.shared_experts, "shared_expert", j) for j in range(self.config.n_shared_experts))
            return ExpertOutput(add_all(expert(x) for expert in shared), saved=None)
        ones = jnp.ones((x.shape[0], self.config.n_shared_experts), at_least_float32(self.dtype))
        return expert_ffn(self.kernels.shared, x, ones, every_token(x.shape[0]), experts)
