"""Planted faults: each changes the PyTorch side like a real mistake, to test which rung of the ladder catches it."""

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
import torch_ref.muon as muon
import torch_ref.step as stepping
from parity_tests.settings import SMALL
from torch_ref import CustomLLM

Plant = Callable[[CustomLLM], AbstractContextManager[None]]


class Mutation(NamedTuple):
    plant: Plant
    rung: str
    """The lowest rung, which must catch the fault."""
    what: str
    """The first comparison of that rung that must fail."""
    optimizer: str | None = None
    """The optimizer that can have the fault; None: each."""


MUTATIONS: dict[str, Mutation] = {}


def _mutation(rung: str, what: str, optimizer: str | None = None) -> Callable[[Callable], Plant]:
    """Register a generator function in MUTATIONS as a context manager."""

    def register(function: Callable) -> Plant:
        plant = contextmanager(function)
        MUTATIONS[function.__name__] = Mutation(plant, rung, what, optimizer)
        return plant

    return register


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
    """Change the output of the module."""
    handle = module.register_forward_hook(lambda module, args, output: change(output))
    try:
        yield
    finally:
        handle.remove()


# weights


@_mutation("weights", "weights")
def weight_transposed(model: CustomLLM) -> Iterator[None]:
    """A square matrix is copied as (in, out)."""
    weight = model.decoder_layers[0].self_attn.o_proj.weight
    with _changed(weight, weight.T.clone()):
        yield


@_mutation("weights", "weights")
def experts_exchanged(model: CustomLLM) -> Iterator[None]:
    """Two routed experts of the last layer are swapped."""
    experts = model.decoder_layers[-1].mlp.routed_experts
    first, second = experts[0], experts[1]
    experts[0], experts[1] = second, first
    try:
        yield
    finally:
        experts[0], experts[1] = first, second


@_mutation("weights", "weights")
def routing_bias_lost(model: CustomLLM) -> Iterator[None]:
    """The converter omits the buffers."""
    bias = model.decoder_layers[0].mlp.routing_bias
    with _changed(bias, torch.zeros_like(bias)):
        yield


# the parts of a layer


@_mutation("layers", "embeddings")
def position_off_by_one(model: CustomLLM) -> Iterator[None]:
    """Positions start at one."""
    limit = model.config.max_position_embeddings - 1
    positions = CustomLLM._positions

    def late(*args) -> Tensor:
        return (positions(*args) + 1).clamp(max=limit)

    with mock.patch.object(CustomLLM, "_positions", staticmethod(late)):
        yield


@_mutation("layers", "input norm")
def norm_weight_dropped(model: CustomLLM) -> Iterator[None]:
    """The norm does not multiply by its weight."""

    def plain(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps)

    with mock.patch.object(reference.CustomRMSNorm, "forward", plain):
        yield


@_mutation("layers", "post-attention norm")
def second_norm_unweighted(model: CustomLLM) -> Iterator[None]:
    """Only the norm before the experts does not multiply by its weight."""
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
    """The pairs rotate in the other direction: the two halves of the rotary dimensions are swapped."""
    rotate = reference.RotaryEmbedding.forward

    def swapped(self, x: Tensor, positions: Tensor) -> Tensor:
        first, second = rotate(self, torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1), positions).chunk(2, dim=-1)
        return torch.cat([second, first], dim=-1)

    with mock.patch.object(reference.RotaryEmbedding, "forward", swapped):
        yield


@_mutation("layers", "attention")
def rope_interleaved(model: CustomLLM) -> Iterator[None]:
    """The rotated pairs are adjacent dimensions, as in other models, instead of the two halves."""
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
    """The mask lets every token attend to the next one."""

    def leaky(config, x, attention_mask, cache, position_ids):
        length, past = x.shape[1], 0 if cache is None else cache.get_seq_length()
        return torch.ones(1, 1, length, past + length, dtype=torch.bool, device=x.device).tril(past + 1)

    with mock.patch.object(reference, "causal_mask", leaky):
        yield


@contextmanager
def _rerouted(change: Callable[..., reference.Routing]) -> Iterator[None]:
    """Replace `route(*args)` by `change(route, *args)`."""
    route = reference.route
    with mock.patch.object(reference, "route", lambda *args: change(route, *args)):
        yield


@_mutation("layers", "router scores")
def scores_by_softmax(model: CustomLLM) -> Iterator[None]:
    """The router's scores are a softmax, as in DeepSeek-V2, instead of sigmoids."""

    def by_softmax(route, *args):
        routing = route(*args)
        return routing._replace(scores=routing.logits.softmax(dim=-1))

    with _rerouted(by_softmax):
        yield


@_mutation("layers", "expert choice")
def choice_unbiased(model: CustomLLM) -> Iterator[None]:
    """The routing bias does not affect the choice."""
    with _rerouted(lambda route, logits, bias, *rest: route(logits, torch.zeros_like(bias), *rest)):
        yield


@_mutation("layers", "experts")
def gate_biased(model: CustomLLM) -> Iterator[None]:
    """The gates use the score with the routing bias, which should only affect the choice."""

    def biased(route, logits, routing_bias, *rest):
        routing = route(logits, routing_bias, *rest)
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
    """A shared expert returns zeros."""
    with _hooked(model.decoder_layers[0].mlp.shared_experts[0], torch.zeros_like):
        yield


@_mutation("layers", "residual")
def residual_after_the_norm(model: CustomLLM) -> Iterator[None]:
    """The experts' output is added to the normalized stream instead of the residual stream."""

    def post_norm(self, x, positions, mask, experts=None, **kwargs):
        x = x + self.self_attn(self.input_norm(x), positions, mask, **kwargs)[0]
        normed = self.post_attn_norm(x)
        mixed, routing = self.mlp(normed, experts)
        return normed + mixed, routing, None

    with mock.patch.object(reference.DecoderLayer, "forward", post_norm):
        yield


# logits and loss


@_mutation("logits", "logits")
def head_bias_dropped(model: CustomLLM) -> Iterator[None]:
    """lm_head does not add its bias."""
    with _hooked(model.lm_head, lambda logits: logits - model.lm_head.bias):
        yield


@contextmanager
def _loss(change: Callable[..., Tensor]) -> Iterator[None]:
    """Replace `next_token_loss(*args)` by `change(next_token_loss, *args)`."""
    loss = reference.next_token_loss
    with mock.patch.object(reference, "next_token_loss", lambda *args: change(loss, *args)):
        yield


@_mutation("loss", "loss")
def labels_not_shifted(model: CustomLLM) -> Iterator[None]:
    """The loss scores each position on its own input token, the mistake of the source."""

    def unshifted(loss, logits, labels, num_items=None):
        return loss(logits, labels.roll(1, dims=1), num_items)

    with _loss(unshifted):
        yield


@_mutation("loss", "loss")
def labels_shifted_twice(model: CustomLLM) -> Iterator[None]:
    """The caller and the loss both shift the labels."""
    with _loss(lambda loss, logits, labels, num_items=None: loss(logits, labels.roll(-1, dims=1), num_items)):
        yield


# gradients


@_mutation("gradients", "training loss")
def mean_of_means(model: CustomLLM) -> Iterator[None]:
    """Each micro-batch is divided by its own targets, and the sum by the number of micro-batches."""

    def mean_of_micro_batch(loss, logits, labels, num_items=None):
        return loss(logits, labels) / (1 if num_items is None else SMALL.micro_batches)

    with _loss(mean_of_micro_batch):
        yield


@_mutation("gradients", "training loss")
def dropout_left_on(model: CustomLLM) -> Iterator[None]:
    """Dropout is on in training, although its rate should be zero."""
    with mock.patch.object(model.dropout, "p", 0.1):
        yield


@_mutation("gradients", "gradients")
def gates_detached(model: CustomLLM) -> Iterator[None]:
    """No gradient flows through the gates, so the router is not trained."""

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

    def resetting(self, *args, **kwargs):
        if self.training:
            self.zero_grad()
        return forward(self, *args, **kwargs)

    with mock.patch.object(CustomLLM, "forward", resetting):
        yield


# one step


class FaultyAdamW(torch.optim.AdamW):
    """AdamW written out, with one of three optional mistakes."""

    eps_inside = False
    corrected = True
    decays = True

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
                p.mul_(1 - rate * group["weight_decay"] * self.decays)
                p.sub_(rate * mu / ((nu + eps).sqrt() if self.eps_inside else nu.sqrt() + eps))


@_mutation("step", "update", "adamw")
def adam_eps_inside_the_root(model: CustomLLM) -> Iterator[None]:
    """sqrt(nu + eps) instead of sqrt(nu) + eps."""
    faulty = type("EpsInside", (FaultyAdamW,), {"eps_inside": True})
    with mock.patch.object(torch.optim, "AdamW", faulty):
        yield


@_mutation("step", "update", "adamw")
def adam_not_corrected(model: CustomLLM) -> Iterator[None]:
    """The moments have no bias correction."""
    with mock.patch.object(torch.optim, "AdamW", type("Uncorrected", (FaultyAdamW,), {"corrected": False})):
        yield


@_mutation("step", "second moments", "adamw")
def adam_beta2_default(model: CustomLLM) -> Iterator[None]:
    """The optimizer uses PyTorch's default beta2 instead of the config's."""
    adamw = torch.optim.AdamW

    def with_default(groups, lr, betas, **options):
        return adamw(groups, lr=lr, betas=(betas[0], 0.999), **options)

    with mock.patch.object(torch.optim, "AdamW", with_default):
        yield


@_mutation("step", "first moments", "adamw")
def decay_in_the_gradient(model: CustomLLM) -> Iterator[None]:
    """Adam with L2 regularization instead of decoupled decay."""
    with mock.patch.object(torch.optim, "AdamW", torch.optim.Adam):
        yield


@_mutation("step", "update", "muon")
def muon_without_nesterov(model: CustomLLM) -> Iterator[None]:
    """The momentum is orthogonalized, without the look ahead."""
    with mock.patch.object(muon, "nesterov", lambda grad, momentum, beta: momentum):
        yield


@_mutation("step", "update", "muon")
def muon_transposed(model: CustomLLM) -> Iterator[None]:
    """A square matrix is transposed before the iteration, and not afterwards."""
    iterate = muon.newton_schulz

    def transposed(x, dtype):
        return iterate(x.mT if x.shape[-2] == x.shape[-1] else x, dtype)

    with mock.patch.object(muon, "newton_schulz", transposed):
        yield


@_mutation("step", "update", "muon")
def muon_scaled_by_the_shorter_side(model: CustomLLM) -> Iterator[None]:
    """0.2 * sqrt(min(in, out)) instead of the larger of the two."""
    with mock.patch.object(muon, "scale", lambda shape: muon.RMS * min(shape[-2:]) ** 0.5):
        yield


@_mutation("step", "first moments", "muon")
def muon_decay_in_the_gradient(model: CustomLLM) -> Iterator[None]:
    """L2 regularization instead of decoupled decay."""
    update = muon.MuonWithAdamW._update

    def coupled(self, parameter, group, blocks):
        parameter.grad.add_(parameter, alpha=group["weight_decay"])
        update(self, parameter, group | {"weight_decay": 0.0}, blocks)

    with mock.patch.object(muon.MuonWithAdamW, "_update", coupled):
        yield


@_mutation("step", "update", "muon")
def muon_norm_of_the_stack(model: CustomLLM) -> Iterator[None]:
    """Matrices are divided by the norm of a stack of experts, as if all of them were one matrix."""
    iterate, experts = muon.newton_schulz, model.config.n_routed_experts

    def shrunk(x, dtype):
        with mock.patch.object(muon, "EPS", float(experts**0.5 * x.norm())):
            return iterate(x, dtype)

    with mock.patch.object(muon, "newton_schulz", shrunk):
        yield


@_mutation("step", "update", "muon")
def muon_four_iterations(model: CustomLLM) -> Iterator[None]:
    """Four Newton-Schulz steps instead of five."""
    with mock.patch.object(muon, "STEPS", 4):
        yield


@_mutation("step", "first moments", "muon")
def muon_for_the_router(model: CustomLLM) -> Iterator[None]:
    """Muon updates the router's matrix too."""
    chosen = stepping.is_hidden_matrix
    with mock.patch.object(stepping, "is_hidden_matrix", lambda name: chosen(name) or name.endswith("router.weight")):
        yield


@_mutation("step", "update")
def decay_on_norms(model: CustomLLM) -> Iterator[None]:
    """Norms and biases decay too."""
    with mock.patch.object(stepping, "decays", return_value=True):
        yield


@_mutation("step", "first moments")
def clipping_missing(model: CustomLLM) -> Iterator[None]:
    """The gradient norm is measured but not clipped."""
    clip = stepping.clip_gradients
    with mock.patch.object(stepping, "clip_gradients", lambda model, limit: clip(model, 1e9)):
        yield


@_mutation("step", "update")
def schedule_off_by_one(model: CustomLLM) -> Iterator[None]:
    """The learning rate is that of the next update."""
    make = stepping.make_schedule
    with mock.patch.object(
        stepping, "make_schedule", lambda optimizer, schedule, peak, done=0: make(optimizer, schedule, peak, done + 1)
    ):
        yield


@contextmanager
def _bias_update(change: Callable[..., None]) -> Iterator[None]:
    """Replace `update_routing_bias(*args)` by `change(update_routing_bias, *args)`."""
    update = stepping.update_routing_bias
    with mock.patch.object(stepping, "update_routing_bias", lambda *args: change(update, *args)):
        yield


@_mutation("step", "routing bias")
def bias_update_reversed(model: CustomLLM) -> Iterator[None]:
    """The routing bias steers towards overloaded experts."""
    with _bias_update(lambda update, model, counts, rate: update(model, counts, -rate)):
        yield


@_mutation("step", "routing bias")
def bias_decays(model: CustomLLM) -> Iterator[None]:
    """The routing bias decays too, by learning rate times weight decay: 1e-4 per step."""

    def decaying(update, model, counts, rate):
        for layer in model.decoder_layers:
            layer.mlp.routing_bias.mul_(1 - 1e-3 * 0.1)
        update(model, counts, rate)

    with _bias_update(decaying):
        yield


@_mutation("step", "routing bias")
def bias_update_summed(model: CustomLLM) -> Iterator[None]:
    """Accumulation sums the sign of each micro-batch instead of taking the sign of the sum."""
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


# visible only after many steps


@_mutation("trajectory", "losses")
def gradients_not_zeroed(model: CustomLLM) -> Iterator[None]:
    """Gradients accumulate over the steps."""
    with mock.patch.object(torch.optim.Optimizer, "zero_grad"):
        yield


def _with_floor(shape: Callable[[int], float], warmup: int, step: int) -> float:
    return shape(step) if step < warmup else max(0.1, shape(step))


@_mutation("trajectory", "losses")
def cosine_with_a_floor(model: CustomLLM) -> Iterator[None]:
    """The learning rate ends at a tenth of its peak instead of zero."""
    make = stepping.make_schedule

    def floored(optimizer, schedule, peak, done=0):
        (shape,) = set(make(optimizer, schedule, peak, done).lr_lambdas)
        floor = functools.partial(_with_floor, shape, schedule.warmup_steps)
        return LambdaLR(optimizer, floor, last_epoch=done - 1)

    with mock.patch.object(stepping, "make_schedule", floored):
        yield


# visible only in decoding


@_mutation("generation", "cached logits")
def cached_position_off_by_one(model: CustomLLM) -> Iterator[None]:
    """The position of a token after cached ones is too large by one."""
    limit = model.config.max_position_embeddings - 1
    positions = CustomLLM._positions

    def late(past, *args) -> Tensor:
        return (positions(past, *args) + (past > 0)).clamp(max=limit)

    with mock.patch.object(CustomLLM, "_positions", staticmethod(late)):
        yield


@_mutation("generation", "greedy tokens")
def padding_attended(model: CustomLLM) -> Iterator[None]:
    """In a batch of prompts of different lengths, the shorter ones attend to their padding."""
    generate = CustomLLM.generate

    def unmasked(self, ids, attention_mask, **options):
        return generate(self, ids, attention_mask=torch.ones_like(attention_mask), **options)

    with mock.patch.object(CustomLLM, "generate", unmasked):
        yield
