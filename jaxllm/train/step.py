"""The one pure training step. Everything that runs it (jit, pmap, accumulation) wraps this function."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm.config.groups import OptimConfig, ScheduleConfig
from jaxllm.model.decoder import STACKS, CustomLLM, model_facts
from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.layout import ONE_DEVICE, Layout
from jaxllm.model.load_balance import updated_routing_bias
from jaxllm.model.numerics import KEY_IMPL
from jaxllm.train.adamw import tree_where
from jaxllm.train.loss import count_targets, next_token_targets, summed_cross_entropy
from jaxllm.train.optim import clip_gradients, learning_rate, update
from jaxllm.train.state import TrainState, state_specs, weight_specs


class StepMetrics(NamedTuple):
    loss: Array  # () mean cross-entropy over the targets of the global batch, nats
    grad_norm: Array  # () global norm before clipping
    learning_rate: Array  # () set for the next update, as the source's log shows it
    expert_load: Array  # () tokens of the fullest expert over the mean, the worst layer; 1 is even


def gradients(
    optim: OptimConfig,
    graph: nnx.GraphDef,
    state: TrainState,
    labels: Array,
    experts: Array | None = None,
    layout: Layout = ONE_DEVICE,
) -> tuple[Pytree, Array, Array]:
    """Gradient of the mean loss over all micro-batches, and over all devices.

    On several devices each of them runs this: the state and the gradient are its part, B are its local rows, and the
    other results are sums over all devices.

    Args:
        optim: the weights of the auxiliary losses.
        graph: the static part of the model. It and `optim` and `layout` are static.
        state: its parameters, routing bias, step and dropout key are read.
        labels: (A, B, T) int32: A micro-batches of token rows, which are inputs and labels at once (-100: ignored).
        experts: (A, L, B, T, k) experts to use instead of the routers' choice, to replay a step. L are here the layers
            that have experts.

    Returns the gradient, the mean cross-entropy in nats, and the tokens of each expert (L, E).
    """
    targets = jnp.maximum(layout.psum(count_targets(labels)), 1)
    config = nnx.merge(graph, state.params, state.routing_bias).config
    facts, _ = model_facts(config)
    rows = layout.devices * labels.shape[1]  # of a micro-batch
    local_rows = layout.device_index() * labels.shape[1] + jnp.arange(labels.shape[1])

    def micro_loss(params: Pytree, micro: Array, index: Array, forced: Array | None):
        model = gathered_model(graph, params, state.routing_bias, facts, layout)
        keys = dropout_keys(state, index, rows, local_rows) if config.dropout else None
        x, record = model.hidden_states(jnp.maximum(micro, 0), dropout_keys=keys, experts=forced, layout=layout)
        # Each micro-batch adds its share of the global mean, so that accumulation is not a mean of means.
        loss = summed_loss(model, x, micro) / targets
        auxiliary = optim.balance_loss * record.balance_loss.sum() + optim.router_z_loss * record.z_loss.sum()
        return loss + auxiliary / (labels.shape[0] * layout.devices), (loss, record.counts)

    gradient = jax.grad(micro_loss, has_aux=True)
    micro_batches = (labels, jnp.arange(labels.shape[0]), experts)
    first = jax.tree.map(lambda leaf: leaf[0], micro_batches)
    if labels.shape[0] == 1:  # no accumulator besides the gradient
        grads, (loss, counts) = gradient(state.params, *first)
    else:

        def accumulate(total, micro):
            return jax.tree.map(jnp.add, total, gradient(state.params, *micro)), None

        shapes = jax.eval_shape(gradient, state.params, *first)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (grads, (loss, counts)), _ = jax.lax.scan(accumulate, zeros, micro_batches)
    return layout.sum_gradients(grads, facts), *layout.psum((loss, counts))


def dropout_keys(state: TrainState, index: Array, rows: int, local_rows: Array) -> Array:
    """Keys of the rows `local_rows` of micro-batch `index`, which has `rows` on all devices."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.dropout_key, impl=KEY_IMPL), state.step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index * rows + local_rows)


def train_step(
    optim: OptimConfig,
    schedule: ScheduleConfig,
    graph: nnx.GraphDef,
    state: TrainState,
    labels: Array,
    experts: Array | None = None,
    layout: Layout = ONE_DEVICE,
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step: the new state, and measurements that stay on the device. Donate the state.

    Arguments as in `gradients`, but on a mesh they are global arrays.
    """
    model = nnx.merge(graph, state.params, state.routing_bias)
    specs = state_specs(model.config, optim, layout)
    global_gradients = layout.shard_map(  # what follows is elementwise but for Muon, and XLA partitions it
        functools.partial(gradients, optim, graph, layout=layout),
        in_specs=(specs, layout.batch_spec(1), layout.batch_spec(2)),
        out_specs=(specs.params, PartitionSpec(), PartitionSpec()),
    )
    grads, loss, counts = global_gradients(state, labels, experts)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)  # a step that is not finite changes nothing
    grads = clip_gradients(grads, grad_norm, optim.max_grad_norm)
    rate = learning_rate(schedule, optim.learning_rate, state.opt_state.count)
    params, opt_state = update(optim, model, grads, state.opt_state, state.params, rate, finite, layout)
    metrics = StepMetrics(
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=learning_rate(schedule, optim.learning_rate, opt_state.count),
        expert_load=(counts.max(axis=-1) / counts.mean(axis=-1)).max(initial=1.0),
    )
    new_bias = jax.tree.map(lambda bias: updated_routing_bias(bias, counts, optim.bias_update_rate), state.routing_bias)
    routing_bias = tree_where(finite, new_bias, state.routing_bias)
    return TrainState(params, routing_bias, opt_state, state.step + 1, state.dropout_key), metrics


def eval_step(
    graph: nnx.GraphDef, params: Pytree, routing_bias: Pytree, labels: Array, layout: Layout = ONE_DEVICE
) -> tuple[Array, Array]:
    """Summed cross-entropy and number of targets of a batch (B, T), without dropout."""
    config = nnx.merge(graph, params, routing_bias).config
    facts, _ = model_facts(config)

    def local(params: Pytree, routing_bias: Pytree, labels: Array) -> tuple[Array, Array]:
        model = gathered_model(graph, params, routing_bias, facts, layout)
        x, _ = model.hidden_states(jnp.maximum(labels, 0), layout=layout)
        return layout.psum((summed_loss(model, x, labels), count_targets(labels)))

    in_specs = (*weight_specs(config, layout), layout.batch_spec(0))
    return layout.shard_map(local, in_specs, out_specs=PartitionSpec())(params, routing_bias, labels)


def gathered_model(
    graph: nnx.GraphDef, params: Pytree, routing_bias: Pytree, facts: Pytree, layout: Layout
) -> CustomLLM:
    """The model on a device's part of the weights. Those outside the layers are gathered here; a layer's are gathered
    when it runs."""
    outer = {name: part for name, part in params.items() if name not in STACKS}
    outer_facts = {name: facts[name] for name in outer}
    return nnx.merge(graph, params | layout.gather(outer, outer_facts), routing_bias)


def summed_loss(model: CustomLLM, x: Array, labels: Array) -> Array:
    """Summed next-token cross-entropy of labels (B,T), given the layers' output for them: x (B,T,D)."""
    hidden = model.apply_final_norm(x).reshape(-1, x.shape[-1])
    return summed_cross_entropy(hidden, *model.head(), next_token_targets(labels).reshape(-1))
