"""Train in either framework from the same weights and moments, and record everything that a step changes.

Both sides are the functions used for training: `jaxllm.train.step` and `torch_ref.step`. Arrays have PyTorch's names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

import torch_ref.step as torch_step
from jaxllm.config import TrainConfig
from jaxllm.config.families import is_interleaved
from jaxllm.model.batch import TokenBatch
from jaxllm.model.decoder import abstract_model
from jaxllm.store.checkpoint import Weights
from jaxllm.train import step as jax_step
from jaxllm.train.optim import OptimizerState, of_adamw
from jaxllm.train.state import TrainState, start_state
from jaxllm.train.step import StepMetrics
from parity_tests import hf_side
from parity_tests.forward import DTYPES, jax_precision, jax_weights, state_dict_arrays, torch_named
from torch_ref import CustomLLM as TorchCustomLLM
from torch_ref.muon import moment_names

Named = dict[str, np.ndarray]


class Gradients(NamedTuple):
    loss: float
    grads: Named
    experts: np.ndarray | None  # (A,L,B,T,k), chosen by PyTorch's routers; None from JAX


class Trained(NamedTuple):
    """The state after one or more steps, and the metrics of each step."""

    losses: list[float]
    grad_norms: list[float]
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


_gradients = jax.jit(jax_step.gradients, static_argnums=(0, 1))
_step = jax.jit(jax_step.train_step, static_argnums=(0, 1, 2), donate_argnums=3)


class JaxTraining:
    """Gradients and steps of the Flax model in one precision; each is compiled once for all models of a config."""

    def __init__(self, config: TrainConfig, weights: Weights, precision: str, interleaved: bool = True):
        self.config, self.weights, self.precision = config, weights, precision
        self._named = functools.partial(torch_named, config.model, interleaved=interleaved)
        with jax_precision(precision):
            graph, _, _ = abstract_model(config.model, dtype=DTYPES[precision])
        self._gradients = functools.partial(_gradients, config.optim, graph)
        self._step = functools.partial(_step, config.optim, config.schedule, graph)

    def gradients(self, labels: np.ndarray, experts: np.ndarray | None = None) -> Gradients:
        """Gradients of the mean loss over micro-batches (A,B,T); `experts` (A,L,B,T,k) replaces the routers' choice."""
        with jax_precision(self.precision):
            grads, loss, _ = self._gradients(self._start(), TokenBatch(jnp.asarray(labels)), experts)
        return Gradients(float(loss), self._named(grads), None)

    def train(
        self,
        batches: np.ndarray,
        moments: OptimizerState | None = None,
        experts: list[np.ndarray] | None = None,
        before_step: Callable[[int, Weights], None] = lambda i, weights: None,
        weights: Weights | None = None,
    ) -> Trained:
        """Train on batches (steps,A,B,T) from the weights and, if given, from moments.

        Args:
            experts: for each step (A,L,B,T,k), used instead of the routers' choice.
            before_step: called with the index of the step and the weights before it.
            weights: to start from instead of the model's.
        """
        reports: list[StepMetrics] = []
        with jax_precision(self.precision):
            state = self._start(moments, weights)
            for i, labels in enumerate(batches):
                before_step(i, Weights(state.params, state.routing_bias))
                state, metrics = self._step(
                    state, TokenBatch(jnp.asarray(labels)), None if experts is None else experts[i]
                )
                reports.append(metrics)
            reports = jax.device_get(reports)
        after, named = state.opt_state, self._named
        return Trained(
            losses=[float(report.loss) for report in reports],
            grad_norms=[float(report.grad_norm) for report in reports],
            params=named(state.params),
            mu=named(after.mu),
            nu=named(after.nu),
            routing_bias=_routing_bias(named(state.params, state.routing_bias)),
            experts=[],
        )

    def _start(self, moments: OptimizerState | None = None, weights: Weights | None = None) -> TrainState:
        params, routing_bias = jax_weights(self.weights if weights is None else weights, self.precision)
        config, copies = self.config, jax.tree.map(jnp.copy, (params, routing_bias))
        state = start_state(config.model, config.optim, config.seed, *copies)
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
        return state._replace(opt_state=opt_state, step=opt_state.count.copy())


@contextmanager
def _training(model: TorchCustomLLM) -> Iterator[None]:
    """Train mode in this context; the weights are restored afterwards."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    try:
        yield
    finally:
        model.load_state_dict(before)
        model.zero_grad()
        model.eval()


def torch_gradients(model: TorchCustomLLM, config: TrainConfig, labels: np.ndarray) -> Gradients:
    """The PyTorch model's gradients; arguments as in `JaxTraining.gradients`."""
    with _training(model):
        loss, experts = torch_step.accumulate_gradients(
            model, config.optim, config.precision, torch.from_numpy(labels).long()
        )
        # an unused parameter has no gradient, which is not the same as a zero gradient
        grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return Gradients(float(loss), hf_side.in_file(grads), experts.numpy())


def torch_train(
    model: TorchCustomLLM, config: TrainConfig, batches: np.ndarray, moments: OptimizerState | None = None
) -> Trained:
    """Train the PyTorch model; arguments as in `JaxTraining.train`."""
    with _training(model):
        interleaved, E = is_interleaved(model.config.to_dict()), config.model.n_routed_experts
        blocks = hf_side.joined_matrices(model, config.model, interleaved) if hf_side.is_stock(model) else {}
        optimizer = torch_step.make_optimizer(model, config.optim, config.precision, blocks)
        steps_done = 0 if moments is None else int(moments.count)
        schedule = torch_step.make_schedule(optimizer, config.schedule, config.optim.learning_rate, steps_done)
        if moments is not None:
            mu, nu = (torch_named(config.model, tree, interleaved=interleaved) for tree in moments[1:])
            names = {parameter: name for name, parameter in model.named_parameters()}
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state = optimizer.state[parameter]
                    state["step"] = torch.tensor(float(moments.count))
                    for kind, named in zip(moment_names(group), (mu, nu), strict=False):  # Muon has one moment
                        moment = hf_side.in_memory(names[parameter], named, E).copy()
                        state[kind] = torch.from_numpy(moment).to(parameter.dtype)
        fixed = (model, optimizer, schedule, config.optim, config.precision)
        reports = [torch_step.train_step(*fixed, torch.from_numpy(labels).long()) for labels in batches]
        moments_of = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
        state = {name: value.copy() for name, value in state_dict_arrays(model).items()}
    biases = _routing_bias(state)
    return Trained(
        losses=[float(report.loss) for report in reports],
        grad_norms=[float(report.grad_norm) for report in reports],
        params={name: value for name, value in state.items() if name not in biases},
        mu=hf_side.in_file(_moments(moments_of, "exp_avg", "momentum_buffer")),
        nu=hf_side.in_file(_moments(moments_of, "exp_avg_sq")),
        routing_bias=biases,
        experts=[report.experts.numpy() for report in reports],
    )


def _moments(states: dict[str, dict[str, torch.Tensor]], *kinds: str) -> Named:
    return {name: state[kind].numpy() for name, state in states.items() for kind in kinds if kind in state}


def _routing_bias(named: Named) -> Named:
    return {name: value for name, value in named.items() if name.endswith(torch_step.ROUTING_BIASES)}
