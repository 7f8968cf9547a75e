"""Planted faults: each changes the PyTorch side as a real mistake would, to see which rung of the ladder catches it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import torch_ref.model as reference
import torch_ref.step as stepping
from torch_ref import CustomLLM

Plant = Callable[[CustomLLM], AbstractContextManager[None]]


class Mutation(NamedTuple):
    plant: Plant
    rung: str
    """The lowest rung that must catch it."""
    what: str
    """And the first comparison of that rung which must fail."""


MUTATIONS: dict[str, Mutation] = {}


def _mutation(rung: str, what: str) -> Callable[[Callable], Plant]:
    """Enter a generator function into the table as a context manager."""

    def enter(function: Callable) -> Plant:
        plant = contextmanager(function)
        MUTATIONS[function.__name__] = Mutation(plant, rung, what)
        return plant

    return enter


@contextmanager
def _changed(tensor: Tensor, value: Tensor) -> Iterator[None]:
    original = tensor.detach().clone()
    with torch.no_grad():
        tensor.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            tensor.copy_(original)


@contextmanager
def _hooked(module: torch.nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The module returns something else."""
    handle = module.register_forward_hook(lambda module, args, output: change(output))
    try:
        yield
    finally:
        handle.remove()


# weights


@_mutation("weights", "weights")
def weight_transposed(model: CustomLLM) -> Iterator[None]:
    """A square matrix was copied as (in, out)."""
    weight = model.decoder_layers[0].self_attn.o_proj.weight
    with _changed(weight, weight.T.clone()):
        yield


@_mutation("weights", "weights")
def experts_exchanged(model: CustomLLM) -> Iterator[None]:
    """Two routed experts of the last layer stand in each other's place."""
    experts = model.decoder_layers[-1].mlp.routed_experts
    first, second = experts[0], experts[1]
    experts[0], experts[1] = second, first
    try:
        yield
    finally:
        experts[0], experts[1] = first, second


@_mutation("weights", "weights")
def routing_bias_lost(model: CustomLLM) -> Iterator[None]:
    """The converter forgot the buffers."""
    bias = model.decoder_layers[0].mlp.routing_bias
    with _changed(bias, torch.zeros_like(bias)):
        yield


# the parts of a layer


@_mutation("layers", "embeddings")
def position_off_by_one(model: CustomLLM) -> Iterator[None]:
    """Positions count from one."""
    limit = model.config.max_position_embeddings - 1
    positions = CustomLLM._positions

    def late(*args) -> Tensor:
        return (positions(*args) + 1).clamp(max=limit)

    with mock.patch.object(CustomLLM, "_positions", staticmethod(late)):
        yield


@_mutation("layers", "input norm")
def norm_weight_dropped(model: CustomLLM) -> Iterator[None]:
    """The norm forgets to multiply by its weight."""

    def plain(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps)

    with mock.patch.object(reference.CustomRMSNorm, "forward", plain):
        yield


@_mutation("layers", "post-attention norm")
def second_norm_unweighted(model: CustomLLM) -> Iterator[None]:
    """The norm before the experts forgets its weight, the one before attention does not."""
    norm = model.decoder_layers[0].post_attn_norm
    with _hooked(norm, lambda normed: normed / norm.weight):
        yield


@_mutation("layers", "input norm")
def norm_eps_outside_the_root(model: CustomLLM) -> Iterator[None]:
    """x / (sqrt(mean(x²)) + eps) instead of x / sqrt(mean(x²) + eps)."""

    def outside(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True).sqrt() + self.eps) * self.weight

    with mock.patch.object(reference.CustomRMSNorm, "forward", outside):
        yield


@_mutation("layers", "attention")
def rope_halves_swapped(model: CustomLLM) -> Iterator[None]:
    """The pairs rotate the other way round, as if the two halves of the rotary dimensions were exchanged."""
    rotate = reference.RotaryEmbedding.forward

    def swapped(self, x: Tensor, positions: Tensor) -> Tensor:
        first, second = rotate(self, torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1), positions).chunk(2, dim=-1)
        return torch.cat([second, first], dim=-1)

    with mock.patch.object(reference.RotaryEmbedding, "forward", swapped):
        yield


@_mutation("layers", "attention")
def rope_interleaved(model: CustomLLM) -> Iterator[None]:
    """Neighbouring dimensions form the pairs, as in other models, instead of the two halves."""
    rotate = reference.RotaryEmbedding.forward

    def interleaved(self, x: Tensor, positions: Tensor) -> Tensor:
        halves = torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)
        return torch.stack(rotate(self, halves, positions).chunk(2, dim=-1), dim=-1).flatten(-2)

    with mock.patch.object(reference.RotaryEmbedding, "forward", interleaved):
        yield


@_mutation("layers", "attention")
def scale_missing(model: CustomLLM) -> Iterator[None]:
    """The scores are not divided by sqrt(h)."""
    head_size = model.config.hidden_size // model.config.num_attention_heads
    softmax = reference.masked_softmax
    with mock.patch.object(reference, "masked_softmax", lambda scores, mask: softmax(scores * head_size**0.5, mask)):
        yield


@_mutation("layers", "attention")
def future_visible(model: CustomLLM) -> Iterator[None]:
    """The mask lets every token see the one after it."""

    def leaky(length, past, attention_mask, device):
        return torch.ones(1, 1, length, past + length, dtype=torch.bool, device=device).tril(past + 1)

    with mock.patch.object(reference, "causal_mask", leaky):
        yield


@contextmanager
def _rerouted(change: Callable[..., reference.Routing]) -> Iterator[None]:
    """`change` gets what `route` gets, and `route` itself in front."""
    route = reference.route
    with mock.patch.object(reference, "route", lambda *args: change(route, *args)):
        yield


@_mutation("layers", "router scores")
def scores_by_softmax(model: CustomLLM) -> Iterator[None]:
    """The router's scores are a softmax, as in DeepSeek-V2, instead of sigmoids."""

    def by_softmax(route, x, router_weight, routing_bias, k, experts=None):
        routing = route(x, router_weight, routing_bias, k, experts)
        return routing._replace(scores=routing.logits.softmax(dim=-1))

    with _rerouted(by_softmax):
        yield


@_mutation("layers", "expert choice")
def choice_unbiased(model: CustomLLM) -> Iterator[None]:
    """The routing bias does not steer the choice."""
    with _rerouted(
        lambda route, x, weight, bias, k, experts=None: route(x, weight, torch.zeros_like(bias), k, experts)
    ):
        yield


@_mutation("layers", "experts")
def gate_biased(model: CustomLLM) -> Iterator[None]:
    """The gates use the score with the routing bias, which may only steer the choice."""

    def biased(route, x, router_weight, routing_bias, k, experts=None):
        routing = route(x, router_weight, routing_bias, k, experts)
        chosen = (routing.scores + routing_bias).gather(-1, routing.experts)
        return routing._replace(gates=chosen / chosen.sum(dim=-1, keepdim=True))

    with _rerouted(biased):
        yield


@_mutation("layers", "experts")
def gates_not_normalized(model: CustomLLM) -> Iterator[None]:
    """The gates of a token do not sum to one."""

    def raw(route, *args):
        routing = route(*args)
        return routing._replace(gates=routing.scores.gather(-1, routing.experts))

    with _rerouted(raw):
        yield


@_mutation("layers", "experts")
def shared_expert_lost(model: CustomLLM) -> Iterator[None]:
    """A shared expert adds nothing."""
    with _hooked(model.decoder_layers[0].mlp.shared_experts[0], torch.zeros_like):
        yield


@_mutation("layers", "residual")
def residual_behind_the_norm(model: CustomLLM) -> Iterator[None]:
    """The experts' output is added to the normed stream instead of the stream itself."""

    def post_norm(self, x, positions, mask, experts=None, past_key_values=None):
        x = x + self.self_attn(self.input_norm(x), positions, mask, past_key_values)
        normed = self.post_attn_norm(x)
        mixed, routing = self.mlp(normed, experts)
        return normed + mixed, routing

    with mock.patch.object(reference.DecoderLayer, "forward", post_norm):
        yield


# logits and loss


@_mutation("logits", "logits")
def head_bias_dropped(model: CustomLLM) -> Iterator[None]:
    """lm_head forgets its bias."""
    with _hooked(model.lm_head, lambda logits: logits - model.lm_head.bias):
        yield


@contextmanager
def _loss(change: Callable[..., Tensor]) -> Iterator[None]:
    """`change` gets what the loss gets, and the loss itself in front."""
    loss = reference.next_token_loss
    with mock.patch.object(reference, "next_token_loss", lambda *args: change(loss, *args)):
        yield


@_mutation("loss", "loss")
def labels_not_shifted(model: CustomLLM) -> Iterator[None]:
    """The loss scores each position on the token that it has already seen: the source's mistake."""

    def unshifted(loss, logits, labels, num_items=None):
        return loss(logits, labels.roll(1, dims=1), num_items)

    with _loss(unshifted):
        yield


@_mutation("loss", "loss")
def labels_shifted_twice(model: CustomLLM) -> Iterator[None]:
    """The caller shifts the labels, and the loss again."""
    with _loss(lambda loss, logits, labels, num_items=None: loss(logits, labels.roll(-1, dims=1), num_items)):
        yield


# gradients


@_mutation("gradients", "training loss")
def mean_of_means(model: CustomLLM) -> Iterator[None]:
    """Each micro-batch is divided by its own targets, and the sum by the number of micro-batches."""

    def own_mean(loss, logits, labels, num_items=None):
        return loss(logits, labels) / (1 if num_items is None else 2)  # the ladder accumulates two

    with _loss(own_mean):
        yield


@_mutation("gradients", "training loss")
def dropout_left_on(model: CustomLLM) -> Iterator[None]:
    """Training drops embeddings that it should not."""
    with mock.patch.object(model.dropout, "p", 0.1):
        yield


@_mutation("gradients", "gradients")
def gates_detached(model: CustomLLM) -> Iterator[None]:
    """No gradient flows through the gates, so that the router does not learn."""

    def detached(route, *args):
        routing = route(*args)
        return routing._replace(gates=routing.gates.detach())

    with _rerouted(detached):
        yield


@_mutation("gradients", "gradients")
def latent_detached(model: CustomLLM) -> Iterator[None]:
    """No gradient flows through the latent of keys and values."""
    with _hooked(model.decoder_layers[0].self_attn.kv_proj_d, Tensor.detach):
        yield


@_mutation("gradients", "gradients")
def micro_batch_lost(model: CustomLLM) -> Iterator[None]:
    """The second micro-batch's gradient replaces the first one's instead of adding to it."""
    forward = CustomLLM.forward

    def forgetful(self, *args, **kwargs):
        if self.training:
            self.zero_grad()
        return forward(self, *args, **kwargs)

    with mock.patch.object(CustomLLM, "forward", forgetful):
        yield


# one step


class FaultyAdamW(torch.optim.AdamW):
    """AdamW written out, with one of two mistakes."""

    eps_inside = False
    corrected = True

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            (beta1, beta2), rate, eps = group["betas"], group["lr"], group["eps"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"step": torch.tensor(0.0), "exp_avg": p * 0, "exp_avg_sq": p * 0}
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
                count = int(state["step"]) if self.corrected else 1_000_000
                mu, nu = state["exp_avg"] / (1 - beta1**count), state["exp_avg_sq"] / (1 - beta2**count)
                p.mul_(1 - rate * group["weight_decay"])
                p.sub_(rate * mu / ((nu + eps).sqrt() if self.eps_inside else nu.sqrt() + eps))


@_mutation("step", "update")
def adam_eps_inside_the_root(model: CustomLLM) -> Iterator[None]:
    """sqrt(nu + eps) instead of sqrt(nu) + eps."""
    faulty = type("EpsInside", (FaultyAdamW,), {"eps_inside": True})
    with mock.patch.object(torch.optim, "AdamW", faulty):
        yield


@_mutation("step", "update")
def adam_not_corrected(model: CustomLLM) -> Iterator[None]:
    """The moments are not corrected for their start at zero."""
    with mock.patch.object(torch.optim, "AdamW", type("Uncorrected", (FaultyAdamW,), {"corrected": False})):
        yield


@_mutation("step", "second moments")
def adam_beta2_default(model: CustomLLM) -> Iterator[None]:
    """The optimizer has PyTorch's beta2 instead of the config's."""
    adamw = torch.optim.AdamW

    def with_default(groups, lr, betas, eps):
        return adamw(groups, lr=lr, betas=(betas[0], 0.999), eps=eps)

    with mock.patch.object(torch.optim, "AdamW", with_default):
        yield


@_mutation("step", "first moments")
def decay_in_the_gradient(model: CustomLLM) -> Iterator[None]:
    """Adam with L2 regularization instead of decoupled decay."""
    with mock.patch.object(torch.optim, "AdamW", torch.optim.Adam):
        yield


@_mutation("step", "update")
def decay_on_norms(model: CustomLLM) -> Iterator[None]:
    """Norms and biases decay too."""
    with mock.patch.object(stepping, "decays", return_value=True):
        yield


@_mutation("step", "first moments")
def clipping_missing(model: CustomLLM) -> Iterator[None]:
    """The gradient's norm is measured and not limited."""
    clip = stepping.clip_gradients
    with mock.patch.object(stepping, "clip_gradients", lambda model, limit: clip(model, 1e9)):
        yield


@_mutation("step", "update")
def schedule_off_by_one(model: CustomLLM) -> Iterator[None]:
    """The learning rate is that of the next update."""
    make = stepping.make_schedule
    with mock.patch.object(
        stepping, "make_schedule", lambda optimizer, config, done=0: make(optimizer, config, done + 1)
    ):
        yield


@contextmanager
def _bias_update(change: Callable[..., None]) -> Iterator[None]:
    """`change` gets what the update of the routing bias gets, and the update itself in front."""
    update = stepping.update_routing_bias
    with mock.patch.object(stepping, "update_routing_bias", lambda *args: change(update, *args)):
        yield


@_mutation("step", "routing bias")
def bias_update_reversed(model: CustomLLM) -> Iterator[None]:
    """The routing bias pushes towards crowded experts."""
    with _bias_update(lambda update, model, counts, rate: update(model, counts, -rate)):
        yield


@_mutation("step", "routing bias")
def bias_decays(model: CustomLLM) -> Iterator[None]:
    """The routing bias is among the parameters that decay: by learning rate times weight decay, 1e-4 a step."""

    def decaying(update, model, counts, rate):
        for layer in model.decoder_layers:
            layer.mlp.routing_bias.mul_(1 - 1e-3 * 0.1)
        update(model, counts, rate)

    with _bias_update(decaying):
        yield


@_mutation("step", "routing bias")
def bias_update_summed(model: CustomLLM) -> Iterator[None]:
    """Accumulation adds up the sign of each micro-batch instead of taking the sign of their sum."""
    count, update = stepping.tokens_per_expert, stepping.update_routing_bias

    def of_each(router_experts, n_experts):
        return [count(micro, n_experts) for micro in zip(*router_experts, strict=True)]

    def update_with_each(model, counts, rate):
        for of_micro_batch in counts:
            update(model, of_micro_batch, rate)

    with (
        mock.patch.object(stepping, "tokens_per_expert", of_each),
        mock.patch.object(stepping, "update_routing_bias", update_with_each),
    ):
        yield


# what only many steps show


@_mutation("trajectory", "losses")
def gradients_not_zeroed(model: CustomLLM) -> Iterator[None]:
    """Each step's gradient adds to those of the steps before."""
    with mock.patch.object(torch.optim.Optimizer, "zero_grad"):
        yield


def _with_floor(shape: Callable[[int], float], warmup: int, step: int) -> float:
    return shape(step) if step < warmup else max(0.1, shape(step))


@_mutation("trajectory", "parameters")
def cosine_with_a_floor(model: CustomLLM) -> Iterator[None]:
    """The learning rate ends at a tenth of its peak instead of zero."""
    make = stepping.make_schedule

    def floored(optimizer, config, done=0):
        schedule = make(optimizer, config, done)
        (shape,) = set(schedule.lr_lambdas)
        floor = functools.partial(_with_floor, shape, config.schedule.warmup_steps)
        return LambdaLR(optimizer, floor, last_epoch=done - 1)

    with mock.patch.object(stepping, "make_schedule", floored):
        yield


# what only decoding shows


@_mutation("generation", "cached logits")
def cached_position_off_by_one(model: CustomLLM) -> Iterator[None]:
    """A token that follows cached ones counts its position from one."""
    positions = CustomLLM._positions

    def late(past, *args) -> Tensor:
        return positions(past, *args) + (past > 0)

    with mock.patch.object(CustomLLM, "_positions", staticmethod(late)):
        yield


@_mutation("generation", "greedy tokens")
def padding_attended(model: CustomLLM) -> Iterator[None]:
    """Generation from prompts of different lengths lets the shorter ones see their padding."""
    generate = CustomLLM.generate

    def unmasked(self, ids, attention_mask, **options):
        return generate(self, ids, attention_mask=torch.ones_like(attention_mask), **options)

    with mock.patch.object(CustomLLM, "generate", unmasked):
        yield
