"""The one pure training step. Everything that runs it (jit, pmap, accumulation) wraps this function."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm.config import ModelConfig, TrainConfig
from jaxllm.loss import count_targets, next_token_targets, summed_cross_entropy
from jaxllm.model.decoder import CustomLLM
from jaxllm.model.moe import RoutingBias, updated_routing_bias
from jaxllm.optim import adam_moments, choose, learning_rate_schedule, optimizer
from jaxllm.sharding import ONE_DEVICE, Layout

Array = jax.Array
Pytree = Any


class TrainState(NamedTuple):
    """All that a step changes; a plain pytree of arrays."""

    params: Pytree  # nested dict of float32 masters, stacked over layers and experts
    routing_bias: Pytree  # nested dict with one (L,E) leaf
    opt_state: optax.OptState
    step: Array  # () int32, steps done, with those that were not finite and changed nothing else
    dropout_key: Array  # raw key data, uint32; each step and micro-batch folds its number in


class StepMetrics(NamedTuple):
    loss: Array  # () mean cross-entropy over the targets of the global batch, nats
    grad_norm: Array  # () global norm before clipping
    learning_rate: Array  # () set for the next update, as the source's log shows it
    expert_load: Array  # () tokens of the fullest expert over the mean, the worst layer; 1 is even


def split_model(model: CustomLLM) -> tuple[nnx.GraphDef, Pytree, Pytree]:
    """A model as its static part, its parameters and its routing bias: plain nested dicts of arrays."""
    graph, params, bias = nnx.split(model, nnx.Param, RoutingBias)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(bias)


def abstract_model(config: ModelConfig, **options) -> tuple[nnx.GraphDef, Pytree, Pytree]:
    """`split_model` with shapes in place of arrays: takes no memory."""
    return split_model(nnx.eval_shape(lambda: CustomLLM(config, rngs=nnx.Rngs(0), **options)))


def model_graph(config: TrainConfig, platform: str | None = None) -> nnx.GraphDef:
    """The static part of the model that this run trains, with a platform's kernels (None: those of the device here)."""
    return abstract_model(config.model, dtype=jnp.dtype(config.precision), remat=config.remat, platform=platform)[0]


def count_parameters(params: Pytree) -> int:
    """Trained parameters, arrays or shapes; the routing bias is state and does not count."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def init_state(config: TrainConfig) -> TrainState:
    """A new run: fresh weights, zero moments, step 0."""
    model_key, _ = jax.random.split(jax.random.key(config.seed))
    model = CustomLLM(config.model, rngs=nnx.Rngs(params=model_key))
    _, params, bias = split_model(model)
    return start_state(config, params, bias)


def start_state(config: TrainConfig, params: Pytree, routing_bias: Pytree) -> TrainState:
    """Step 0 on given weights."""
    return TrainState(
        params=params,
        routing_bias=routing_bias,
        opt_state=optimizer(config).init(params),
        step=jnp.zeros((), jnp.int32),
        dropout_key=dropout_key(config),
    )


def dropout_key(config: TrainConfig) -> Array:
    """The raw key data from which all dropout of a run is drawn; it follows from the seed."""
    return jax.random.key_data(jax.random.split(jax.random.key(config.seed))[1])


def gradients(
    config: TrainConfig,
    graph: nnx.GraphDef,
    state: TrainState,
    labels: Array,
    experts: Array | None = None,
    layout: Layout = ONE_DEVICE,
) -> tuple[Pytree, Array, Array]:
    """Gradient of the mean loss over all micro-batches, and over all devices.

    On several devices this is what each of them does: the state is its part, B are its own rows, and what is returned
    are its part of the gradient and the sums of all devices.

    Args:
        config, graph, layout: static.
        state: its parameters, routing bias, step and dropout key are read.
        labels: (A, B, T) int32: A micro-batches of token rows, which are inputs and labels at once (-100: ignored).
        experts: (A, L, B, T, k) experts to use instead of the routers' choice, to replay a step.

    Returns:
        The gradient, the mean cross-entropy in nats, and the tokens of each expert (L, E).
    """
    targets = jnp.maximum(layout.total(count_targets(labels)), 1)
    rows = layout.devices * labels.shape[1]  # of a micro-batch
    own_rows = layout.number() * labels.shape[1] + jnp.arange(labels.shape[1])

    def micro_loss(params: Pytree, micro: Array, index: Array, forced: Array | None):
        model = gathered_model(graph, params, state.routing_bias, layout)
        keys = dropout_keys(config, state, index, rows, own_rows)
        x, record = model.run_layers(jnp.maximum(micro, 0), dropout_keys=keys, experts=forced, layout=layout)
        # Each micro-batch adds its share of the global mean, so that accumulation is no mean of means.
        loss = summed_loss(model, x, micro) / targets
        auxiliary = config.balance_loss * record.balance_loss.sum() + config.router_z_loss * record.z_loss.sum()
        return loss + auxiliary / (labels.shape[0] * layout.devices), (loss, record.counts)

    def of_all_devices(grads: Pytree, loss: Array, counts: Array) -> tuple[Pytree, Array, Array]:
        return layout.sum_gradients(grads), *layout.total((loss, counts))

    gradient = jax.grad(micro_loss, has_aux=True)
    micro_batches = (labels, jnp.arange(labels.shape[0]), experts)
    first = jax.tree.map(lambda leaf: leaf[0], micro_batches)
    if labels.shape[0] == 1:  # no accumulator beside the gradient
        grads, (loss, counts) = gradient(state.params, *first)
        return of_all_devices(grads, loss, counts)

    def accumulate(total, micro):
        return jax.tree.map(jnp.add, total, gradient(state.params, *micro)), None

    shapes = jax.eval_shape(gradient, state.params, *first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (grads, (loss, counts)), _ = jax.lax.scan(accumulate, zeros, micro_batches)
    return of_all_devices(grads, loss, counts)


def dropout_keys(config: TrainConfig, state: TrainState, index: Array, rows: int, own_rows: Array) -> Array | None:
    """Keys of the rows `own_rows` of micro-batch `index`, which has `rows` on all devices; None without dropout."""
    if not config.model.dropout:
        return None
    key = jax.random.fold_in(jax.random.wrap_key_data(state.dropout_key), state.step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index * rows + own_rows)


def train_step(
    config: TrainConfig,
    graph: nnx.GraphDef,
    state: TrainState,
    labels: Array,
    experts: Array | None = None,
    layout: Layout = ONE_DEVICE,
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step. Arguments as in `gradients`, but on a mesh the whole of everything; donate the state.

    Returns:
        The state after, and measurements that stay on the device.
    """
    specs = layout.specs(state)
    of_all_devices = layout.on_each_device(  # what comes behind it is elementwise, and XLA cuts it
        functools.partial(gradients, config, graph, layout=layout),
        in_specs=(specs, layout.batch_spec(1), layout.batch_spec(2)),
        out_specs=(specs.params, PartitionSpec(), PartitionSpec()),
    )
    grads, loss, counts = of_all_devices(state, labels, experts)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)  # a step that is not changes nothing
    updates, opt_state = optimizer(config).update(grads, state.opt_state, state.params, finite=finite)
    metrics = StepMetrics(
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=learning_rate_schedule(config)(adam_moments(opt_state).count),
        expert_load=(counts.max(axis=-1) / counts.mean(axis=-1)).max(),
    )
    new_state = TrainState(
        params=choose(finite, optax.apply_updates(state.params, updates), state.params),
        routing_bias=jax.tree.map(
            lambda bias: choose(finite, updated_routing_bias(bias, counts, config.bias_update_rate), bias),
            state.routing_bias,
        ),
        opt_state=opt_state,
        step=state.step + 1,
        dropout_key=state.dropout_key,
    )
    return new_state, metrics


def eval_step(
    graph: nnx.GraphDef, params: Pytree, routing_bias: Pytree, labels: Array, layout: Layout = ONE_DEVICE
) -> tuple[Array, Array]:
    """Summed cross-entropy and number of targets of a batch (B, T), without dropout."""

    def own(params: Pytree, routing_bias: Pytree, labels: Array) -> tuple[Array, Array]:
        model = gathered_model(graph, params, routing_bias, layout)
        x, _ = model.run_layers(jnp.maximum(labels, 0), layout=layout)
        return layout.total((summed_loss(model, x, labels), count_targets(labels)))

    in_specs = (*layout.specs((params, routing_bias)), layout.batch_spec(0))
    return layout.on_each_device(own, in_specs, out_specs=PartitionSpec())(params, routing_bias, labels)


def gathered_model(graph: nnx.GraphDef, params: Pytree, routing_bias: Pytree, layout: Layout) -> CustomLLM:
    """The model on a device's parts; what lies beside the layers is whole, a layer gathers its own when it runs."""
    outer = {name: part for name, part in params.items() if name != "decoder_layers"}
    return nnx.merge(graph, params | layout.gather(outer), routing_bias)


def summed_loss(model: CustomLLM, x: Array, labels: Array) -> Array:
    """Summed next-token cross-entropy of labels (B,T), given what the layers made of them: x (B,T,D)."""
    hidden = model.normed(x).reshape(-1, x.shape[-1])
    head = model.lm_head
    return summed_cross_entropy(hidden, head.weight[...], head.bias[...], next_token_targets(labels).reshape(-1))
