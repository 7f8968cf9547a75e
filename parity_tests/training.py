"""Train in either framework from the same weights and moments, and record everything that a step changes.

Both sides are the functions used for training: `jaxllm.train.step` and `torch_ref.step`. Arrays have PyTorch's names.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import torch_ref.step as torch_step
from jaxllm.config import TrainConfig
from jaxllm.config.families import is_interleaved
from jaxllm.config.groups import OptimConfig
from jaxllm.model.batch import TokenBatch
from jaxllm.store.checkpoint import Weights
from jaxllm.train import step as jax_step
from jaxllm.train.optim import OptimizerState, StepNumbers, of_adamw, without_numbers
from jaxllm.train.state import TrainState, start_state
from jaxllm.train.step import StepMetrics
from parity_tests import hf_side
from parity_tests.forward import (
    Base,
    jax_frozen,
    jax_precision,
    jax_weights,
    model_graph,
    state_dict_arrays,
    torch_named,
    torch_precision,
)
from parity_tests.recording import first, hooked
from parity_tests.settings import documents_of
from torch_ref import CustomLLM as TorchCustomLLM
from torch_ref.muon import moment_names

Named = dict[str, np.ndarray]


class Gradients(NamedTuple):
    loss: float
    grads: Named
    experts: np.ndarray | None  # (A,L,B,T,k), chosen by PyTorch's routers; None from JAX
    scales: dict[str, float] = {}  # noqa: RUF012  the norm of the gradient at the output of each module; from PyTorch
    norm: float | None = None  # of all together, if they are those of a step

    def scale_of(self, name: str) -> float:
        """The size of the gradients that one is summed from: at the outputs of its module and of the one around it."""
        owner = name.rpartition(".")[0]
        while owner and owner not in self.scales:
            owner = owner.rpartition(".")[0]
        return max(self.scales.get(owner, 0.0), self.scales.get(owner.rpartition(".")[0], 0.0))


class Trained(NamedTuple):
    """The state after one or more steps, and the metrics of each step."""

    losses: list[float]
    grad_norms: list[float]
    rates: list[float]  # of the next step
    loads: list[float]  # of the fullest expert
    params: Named
    mu: Named
    nu: Named
    routing_bias: Named
    experts: list[np.ndarray]  # for each step (A,L,B,T,k), chosen by PyTorch's routers; empty from JAX


def random_moments(config: TrainConfig, weights: Weights, count: int, seed: int = 0) -> OptimizerState:
    """Moments as in the middle of a run: small first moments, second moments larger than their squares."""
    rng = np.random.default_rng(seed)
    mu = jax.tree.map(lambda leaf: 1e-3 * rng.standard_normal(leaf.shape, np.float32), weights.params)
    nu = jax.tree.map(lambda m: np.square(m) + np.square(1e-3 * rng.standard_normal(m.shape, np.float32)), mu)
    return OptimizerState(np.asarray(count, np.int32), mu, of_adamw(config.model, config.optim, nu))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(optim: OptimConfig, graph: nnx.GraphDef, *arrays):
    return jax_step.gradients(optim, graph, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _step(optim: OptimConfig, graph: nnx.GraphDef, *arrays):
    return jax_step.train_step(optim, graph, *arrays)


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(graph: nnx.GraphDef, *arrays):
    return jax_step.eval_step(graph, *arrays)


class JaxTraining:
    """Gradients and steps of the Flax model in one precision; each is compiled once for all models of a config.

    Args:
        recomputes: whether the gradients are computed with remat; None: as the steps are.
        base: as in `jax_trace`.
    """

    def __init__(
        self,
        config: TrainConfig,
        weights: Weights,
        precision: str,
        interleaved: bool = True,
        recomputes: bool | None = None,
        base: Base | None = None,
    ):
        self.config, self.weights, self.precision, self.base = config, weights, precision, base
        self.limit = config.optim.max_grad_norm
        """Of the gradient norm; may be changed."""
        self._named = functools.partial(torch_named, config.model, interleaved=interleaved)
        remat = config.remat if recomputes is None else recomputes
        with jax_precision(precision):
            graph, recomputing = (
                model_graph(config.model, precision, base, remat=again) for again in (config.remat, remat)
            )
        self._gradients = functools.partial(_gradients, config.optim, recomputing)
        self._step = functools.partial(_step, without_numbers(config.optim), graph)
        self._evaluate = functools.partial(_evaluate, graph)

    def gradients(
        self, labels: np.ndarray, experts: np.ndarray | None = None, weights: Weights | None = None
    ) -> Gradients:
        """Gradients of the mean loss over micro-batches (A,B,T).

        Args:
            experts: (A,L,B,T,k), replaces the routers' choice.
            weights: in place of the model's.
        """
        with jax_precision(self.precision):
            grads, loss, _ = self._gradients(self._start(weights=weights), self._batch(labels), experts)
        return Gradients(float(loss), self._named(grads), None)

    def gradients_of_a_step(
        self, labels: np.ndarray, experts: np.ndarray | None = None, weights: Weights | None = None
    ) -> Gradients:
        """As `gradients`, from the first moments of a step from zero moments: the program of the steps is enough."""
        done = self.train(labels[None], None, None if experts is None else [experts], weights=weights)
        return Gradients(done.losses[0], self.gradients_before(done), None, norm=done.grad_norms[0])

    def gradients_before(self, done: Trained, start: Named | None = None) -> Named:
        """The gradients of a step, not yet clipped, from the first moments that it started with; None: zero."""
        optim, grads = self.config.optim, {}
        scale = min(1.0, self.limit / (done.grad_norms[0] + 1e-6))
        for name, moment in done.mu.items():
            beta = optim.beta1 if name in done.nu else optim.muon_momentum
            added = moment if start is None else (moment - beta * start[name].astype(np.float64)).astype(moment.dtype)
            grads[name] = added / ((1 - beta) * scale)
        return grads

    def evaluate(self, labels: np.ndarray) -> tuple[float, int]:
        """Summed loss and number of targets of a batch (B,T), as the training run evaluates it."""
        with jax_precision(self.precision):
            weights = jax_weights(self.weights, self.precision)
            loss, targets = self._evaluate(*weights, self._batch(labels))
        return float(loss), int(targets)

    def train(
        self,
        batches: np.ndarray,
        moments: OptimizerState | None = None,
        experts: list[np.ndarray] | None = None,
        before_step: Callable[[int, Weights], None] = lambda i, weights: None,
        weights: Weights | None = None,
        rate: float | None = None,
    ) -> Trained:
        """Train on batches (steps,A,B,T) from the weights and, if given, from moments.

        Args:
            experts: for each step (A,L,B,T,k), used instead of the routers' choice.
            before_step: called with the index of the step and the weights before it.
            weights: to start from instead of the model's.
            rate: the learning rate instead of the run's.
        """
        optim = dataclasses.replace(self.config.optim, max_grad_norm=self.limit)
        if rate is not None:
            optim = dataclasses.replace(optim, learning_rate=rate)
        reports: list[StepMetrics] = []
        with jax_precision(self.precision):
            state = self._start(moments, weights)
            numbers = StepNumbers.of(optim, self.config.schedule)
            for i, labels in enumerate(batches):
                before_step(i, Weights(state.params, state.routing_bias))
                forced = None if experts is None else experts[i]
                state, metrics = self._step(state, self._batch(labels), numbers, forced)
                reports.append(metrics)
            reports = jax.device_get(reports)
        after, named = state.opt_state, self._named
        return Trained(
            losses=[float(report.loss) for report in reports],
            grad_norms=[float(report.grad_norm) for report in reports],
            rates=[float(report.learning_rate) for report in reports],
            loads=[float(report.expert_load) for report in reports],
            params=named(state.params),
            mu=named(after.mu),
            nu=named(after.nu),
            routing_bias=_routing_bias(named(state.params, state.routing_bias)),
            experts=[],
        )

    def _batch(self, labels: np.ndarray) -> TokenBatch:
        """Labels (...,T) as a step of the run gets them."""
        if not self.config.data.has_targets:
            return TokenBatch(jnp.asarray(labels))
        documents = documents_of(self.config.data, labels.shape[-1])
        return TokenBatch(
            jnp.maximum(labels, 0),
            jnp.asarray(labels),
            None if documents is None else jnp.broadcast_to(documents, labels.shape),
        )

    def _start(self, moments: OptimizerState | None = None, weights: Weights | None = None) -> TrainState:
        params, routing_bias = jax_weights(self.weights if weights is None else weights, self.precision)
        config, copies = self.config, jax.tree.map(jnp.copy, (params, routing_bias))
        state = start_state(config.model, config.optim, config.seed, *copies)
        state = state._replace(frozen=jax_frozen(config.model, self.base, self.precision))
        if moments is None:
            return state
        opt_state = OptimizerState(
            jnp.asarray(moments.count),
            *jax.tree.map(
                lambda leaf, param: jnp.array(leaf, param.dtype),
                moments[1:],
                (params, of_adamw(config.model, config.optim, params)),
            ),
        )
        # as after a step that was not finite: no rate may follow from the number of steps
        return state._replace(opt_state=opt_state, step=opt_state.count + 1)


@contextmanager
def documents_apart(model: Any, config: TrainConfig, tokens: int) -> Iterator[np.ndarray | None]:
    """In this context the model gets the positions of the documents in rows (...,T), and so do balance losses.

    Yields their numbers; None: the run's rows are one document each, and nothing changes.
    """
    documents = documents_of(config.data, tokens)
    if documents is None:
        yield None
        return
    begins = np.flatnonzero(np.diff(documents, prepend=0))
    positions = torch.from_numpy(np.arange(tokens) - begins[documents - 1])[None]

    def place(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"position_ids": positions, "use_cache": False}

    def balance(experts: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        parts = zip(*(values.tensor_split(begins[1:].tolist(), dim=1) for values in (experts, scores)), strict=True)
        return torch.stack([of_row(*part) for part in parts]).mean()

    of_row, watch = torch_step.balance_loss, model.register_forward_pre_hook(place, with_kwargs=True)
    try:
        with mock.patch.object(torch_step, "balance_loss", balance):
            yield documents
    finally:
        watch.remove()


@contextmanager
def _training(model: TorchCustomLLM, config: TrainConfig, labels: np.ndarray) -> Iterator[None]:
    """Train mode in this context, on labels (...,T); the weights are restored afterwards."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    try:
        with documents_apart(model, config, labels.shape[-1]):
            yield
    finally:
        model.load_state_dict(before)
        model.zero_grad()
        model.eval()


def torch_gradients(model: TorchCustomLLM, config: TrainConfig, labels: np.ndarray) -> Gradients:
    """The PyTorch model's gradients; arguments as in `JaxTraining.gradients`."""
    squares: dict[str, float] = {}

    def add(name: str, norm: torch.Tensor) -> None:
        squares[name] = squares.get(name, 0.0) + float(norm) ** 2

    def watch(name: str, output: Any) -> None:
        values = first(output)
        if isinstance(values, torch.Tensor) and values.requires_grad:
            values.register_hook(lambda grad: add(name, torch.linalg.vector_norm(grad)))

    modules = [(module, name) for name, module in model.named_modules()]
    with _training(model, config, labels), hooked(modules, watch):
        loss, experts = torch_step.accumulate_gradients(
            model, config.optim, config.precision, torch.from_numpy(labels).long()
        )
        # an unused parameter has no gradient, which is not the same as a zero gradient
        grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    scales = {name: value**0.5 for name, value in squares.items()}
    return Gradients(float(loss), hf_side.in_file(grads), experts.numpy(), scales)


@torch.no_grad()
def torch_evaluate(model: TorchCustomLLM, config: TrainConfig, labels: np.ndarray) -> tuple[float, int]:
    """As `JaxTraining.evaluate`."""
    tokens = torch.from_numpy(labels).long()
    with torch_precision(config.precision), documents_apart(model, config, labels.shape[-1]):
        mean = float(model(tokens.clamp(min=0), labels=tokens).loss)
    targets = int((labels[:, 1:] != torch_step.IGNORED).sum())
    return mean * targets, targets


@contextmanager
def one_expert_for_all(model: Any, weights: Weights) -> Iterator[Weights]:
    """In this context the routing biases send every token to the first expert, and none to the last.

    Yields the weights of the Flax model with such biases.
    """
    push = hf_side.with_biases(model, lambda bias: _pushed(bias.numpy()))
    with push:
        yield weights._replace(routing_bias=jax.tree.map(_pushed, weights.routing_bias))


def _pushed(bias: np.ndarray) -> np.ndarray:  # (...,E)
    pushed = np.array(bias)
    pushed[..., -1] -= 4  # scores are within 0 and 1
    pushed[..., 0] = 4
    return pushed


def torch_train(
    model: TorchCustomLLM,
    config: TrainConfig,
    batches: np.ndarray,
    moments: OptimizerState | None = None,
    given: tuple[Named, np.ndarray] | None = None,
) -> Trained:
    """Train the PyTorch model; arguments as in `JaxTraining.train`.

    Args:
        given: the gradients, and the experts (A,L,B,T,k), of each step. They are then not computed.
    """
    with _training(model, config, batches), _given(given):
        interleaved, E = is_interleaved(model.config.to_dict()), config.model.n_routed_experts
        blocks = hf_side.joined_matrices(model, config.model, interleaved) if hf_side.is_stock(model) else {}
        optimizer = torch_step.make_optimizer(model, config.optim, config.precision, blocks)
        steps_done = 0 if moments is None else int(moments.count)
        schedule = torch_step.make_schedule(optimizer, config.schedule, config.optim.learning_rate, steps_done)
        if moments is not None:
            mu, nu = (torch_named(config.model, tree, interleaved=interleaved) for tree in moments[1:])
            names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
            for group in optimizer.param_groups:
                for parameter in filter(names.__contains__, group["params"]):
                    state = optimizer.state[parameter]
                    state["step"] = torch.tensor(float(moments.count))
                    for kind, named in zip(moment_names(group), (mu, nu), strict=False):  # Muon has one moment
                        moment = hf_side.in_memory(names[parameter], named, E).copy()
                        state[kind] = torch.from_numpy(moment).to(parameter.dtype)
        trains_all = all(parameter.requires_grad for parameter in model.parameters())
        optim = config.optim if trains_all else dataclasses.replace(config.optim, bias_update_rate=0.0)
        fixed = (model, optimizer, schedule, optim, config.precision)
        reports = [torch_step.train_step(*fixed, torch.from_numpy(labels).long()) for labels in batches]
        moments_of = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
        state = {name: value.copy() for name, value in state_dict_arrays(model).items()}
    biases = _routing_bias(state)
    return Trained(
        losses=[float(report.loss) for report in reports],
        grad_norms=[float(report.grad_norm) for report in reports],
        rates=[float(report.learning_rate) for report in reports],
        loads=[_load(report.experts, E) for report in reports],
        params={name: value for name, value in state.items() if name not in biases},
        mu=hf_side.in_file(_moments(moments_of, "exp_avg", "momentum_buffer")),
        nu=hf_side.in_file(_moments(moments_of, "exp_avg_sq")),
        routing_bias=biases,
        experts=[report.experts.numpy() for report in reports],
    )


@contextmanager
def _given(given: tuple[Named, np.ndarray] | None) -> Iterator[None]:
    """In this context, steps have these gradients and experts."""

    def fill(model: Any, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        grads, experts = given or ({}, np.zeros(0))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                grad = hf_side.in_memory(name, grads, getattr(model.config, "n_routed_experts", 0)).copy()
                parameter.grad = torch.from_numpy(grad).to(parameter.dtype)
        return torch.zeros(()), torch.from_numpy(experts)

    with mock.patch.object(torch_step, "accumulate_gradients", fill) if given else nullcontext():
        yield


def _load(experts: torch.Tensor, E: int) -> float:  # (A,L,B,T,k)
    if not experts.shape[1]:  # no layer has experts
        return 1.0
    return torch_step.expert_load(torch_step.tokens_per_expert(list(experts.swapaxes(0, 1)), E))


def _moments(states: dict[str, dict[str, torch.Tensor]], *kinds: str) -> Named:
    return {name: state[kind].numpy() for name, state in states.items() for kind in kinds if kind in state}


def _routing_bias(named: Named) -> Named:
    return {name: value for name, value in named.items() if name.endswith(torch_step.ROUTING_BIASES)}
