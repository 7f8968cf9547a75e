"""The one pure training step. Everything that runs it (jit, pmap, accumulation) wraps this function."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int, Key

from jaxllm.config.groups import OptimConfig
from jaxllm.model.batch import TokenBatch
from jaxllm.model.decoder import STACKS, CustomLLM, model_facts
from jaxllm.model.dtypes import Array, Pytree
from jaxllm.model.layout import ONE_DEVICE, Layout
from jaxllm.model.load_balance import updated_routing_bias
from jaxllm.model.numerics import KEY_IMPL
from jaxllm.train.adamw import tree_where
from jaxllm.train.loss import count_targets, next_token_targets, summed_cross_entropy
from jaxllm.train.optim import StepNumbers, clip_gradients, learning_rate, update
from jaxllm.train.state import TrainState, state_specs, weight_specs


class StepMetrics(NamedTuple):
    loss: Float[Array, ""]  # mean cross-entropy over the targets of the global batch, nats
    grad_norm: Float[Array, ""]  # global norm before clipping
    learning_rate: Float[Array, ""]  # set for the next update, as the source's log shows it
    expert_load: Float[Array, ""]  # tokens of the most loaded expert over the mean, the worst layer; 1 is balanced


def gradients(
    optim: OptimConfig,
    graph: nnx.GraphDef,
    state: TrainState,
    batch: TokenBatch,
    experts: Int[Array, "A L B T k"] | None = None,
    layout: Layout = ONE_DEVICE,
) -> tuple[Pytree, Float[Array, ""], Int[Array, "L E"]]:
    """Gradient of the mean loss over all micro-batches, and over all devices.

    On several devices each of them runs this: the state and the gradient are its part, B are its local rows, and the
    other results are sums over all devices.

    Args:
        optim: the weights of the auxiliary losses.
        graph: the static part of the model. It and `optim` and `layout` are static.
        state: its parameters, routing bias, step and dropout key are read.
        batch: (A,B,T): A micro-batches of token rows.
        experts: to use instead of the routers' choice, to replay a step. L are here the layers that have experts.

    Returns the gradient, the mean cross-entropy in nats, and the tokens of each expert.
    """
    A, B, _ = batch.ids.shape
    targets = jnp.maximum(layout.psum(count_targets(batch.labels)), 1)
    packed = None if batch.documents is None else jnp.maximum(layout.psum(_documents_and_tokens(batch.documents)), 1)
    model = merged(graph, state.params, state.routing_bias, state.frozen)
    config, (facts, _) = model.config, model_facts(model.config, model.lora)
    rows = layout.devices * B  # of a micro-batch
    local_rows = layout.device_index() * B + jnp.arange(B)

    def micro_loss(params: Pytree, micro: TokenBatch, index: Array, forced: Array | None):
        model = gathered_model(graph, params, state.routing_bias, state.frozen, layout)
        keys = dropout_keys(state, index, rows, local_rows) if config.dropout else None
        x, record = model.hidden_states(
            jnp.maximum(micro.ids, 0), micro.documents, dropout_keys=keys, experts=forced, layout=layout
        )
        # Each micro-batch adds its share of the global mean, so that accumulation is not a mean of means.
        loss = summed_loss(model, x, micro.labels) / targets
        balance, z = record.balance_loss.sum(), record.z_loss.sum()
        if packed is not None:  # these are means over its documents and over its tokens
            share = _documents_and_tokens(micro.documents) / packed * (A * layout.devices)
            balance, z = share[0] * balance, share[1] * z
        auxiliary = optim.balance_loss * balance + optim.router_z_loss * z
        return loss + auxiliary / (A * layout.devices), (loss, record.counts)

    gradient = jax.grad(micro_loss, has_aux=True)
    micro_batches = (batch, jnp.arange(A), experts)
    first = jax.tree.map(lambda leaf: leaf[0], micro_batches)
    if A == 1:  # no accumulator besides the gradient
        grads, (loss, counts) = gradient(state.params, *first)
    else:

        def accumulate(total, micro):
            return jax.tree.map(jnp.add, total, gradient(state.params, *micro)), None

        shapes = jax.eval_shape(gradient, state.params, *first)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (grads, (loss, counts)), _ = jax.lax.scan(accumulate, zeros, micro_batches)
    return layout.sum_gradients(grads, facts), *layout.psum((loss, counts))


def _documents_and_tokens(documents: Int[Array, "*batch T"]) -> Int[Array, "2"]:
    """How many documents rows have (`TokenBatch.documents`), and how many tokens besides padding."""
    return jnp.stack([documents.max(axis=-1).sum(), (documents > 0).sum()])


def dropout_keys(state: TrainState, index: Int[Array, ""], rows: int, local_rows: Int[Array, " B"]) -> Key[Array, " B"]:
    """Keys of the rows `local_rows` of micro-batch `index`, which has `rows` on all devices."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.dropout_key, impl=KEY_IMPL), state.step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index * rows + local_rows)


def train_step(
    optim: OptimConfig,
    graph: nnx.GraphDef,
    state: TrainState,
    batch: TokenBatch,
    numbers: StepNumbers,
    experts: Int[Array, "A L B T k"] | None = None,
    layout: Layout = ONE_DEVICE,
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step: the new state, and measurements that stay on the device. Donate the state.

    Arguments as in `gradients`, but on a mesh they are global arrays, and of `optim` the numbers that are in `numbers`
    are not read.
    """
    model = merged(graph, state.params, state.routing_bias, state.frozen)
    specs = state_specs(model.config, optim, layout, model.lora)
    global_gradients = layout.shard_map(  # what follows is elementwise but for Muon, and XLA partitions it
        functools.partial(gradients, optim, graph, layout=layout),
        in_specs=(specs, layout.batch_spec(1), layout.batch_spec(2)),
        out_specs=(specs.params, PartitionSpec(), PartitionSpec()),
    )
    grads, loss, counts = global_gradients(state, batch, experts)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)  # a step that is not finite changes nothing
    grads = clip_gradients(grads, grad_norm, numbers.max_grad_norm)
    rate = learning_rate(numbers, state.opt_state.count)
    params, opt_state = update(optim, model, grads, state.opt_state, state.params, rate, finite, layout)
    metrics = StepMetrics(
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=learning_rate(numbers, opt_state.count),
        expert_load=(counts.max(axis=-1) / counts.mean(axis=-1)).max(initial=1.0),
    )
    rate = 0.0 if model.is_frozen else optim.bias_update_rate
    new_bias = jax.tree.map(lambda bias: updated_routing_bias(bias, counts, rate), state.routing_bias)
    routing_bias = tree_where(finite, new_bias, state.routing_bias)
    return TrainState(params, routing_bias, opt_state, state.step + 1, state.dropout_key, state.frozen), metrics


def eval_step(
    graph: nnx.GraphDef,
    params: Pytree,
    routing_bias: Pytree,
    batch: TokenBatch,
    layout: Layout = ONE_DEVICE,
    frozen: Pytree = {},  # noqa: B006  it is not changed
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Summed cross-entropy and number of targets of a batch (B,T), without dropout."""
    whole = merged(graph, params, routing_bias, frozen)

    def local(params: Pytree, routing_bias: Pytree, frozen: Pytree, batch: TokenBatch) -> tuple[Array, Array]:
        model = gathered_model(graph, params, routing_bias, frozen, layout)
        x, _ = model.hidden_states(jnp.maximum(batch.ids, 0), batch.documents, layout=layout)
        return layout.psum((summed_loss(model, x, batch.labels), count_targets(batch.labels)))

    in_specs = (*weight_specs(whole.config, layout, whole.lora), layout.batch_spec(0))
    return layout.shard_map(local, in_specs, out_specs=PartitionSpec())(params, routing_bias, frozen, batch)


def merged(graph: nnx.GraphDef, params: Pytree, routing_bias: Pytree, frozen: Pytree) -> CustomLLM:
    """The model of a state's weights."""
    return nnx.merge(graph, params, routing_bias, *[frozen] * bool(frozen))


def gathered_model(
    graph: nnx.GraphDef, params: Pytree, routing_bias: Pytree, frozen: Pytree, layout: Layout
) -> CustomLLM:
    """The model on a device's part of the weights. Those outside the layers are gathered here; a layer's are gathered
    when it runs."""
    model = merged(graph, params, routing_bias, frozen)
    trees = (params, frozen), (model_facts(model.config, model.lora)[0], model_facts(model.config)[0])

    def whole(parts: Pytree, facts: Pytree) -> Pytree:
        outer = {name: part for name, part in parts.items() if name not in STACKS}
        return parts | layout.gather(outer, {name: facts[name] for name in outer})

    params, frozen = map(whole, *trees)
    return merged(graph, params, routing_bias, frozen)


def summed_loss(model: CustomLLM, x: Float[Array, "B T D"], labels: Int[Array, "B T"]) -> Float[Array, ""]:
    """Summed next-token cross-entropy of labels, given the layers' output for them."""
    hidden = model.apply_final_norm(x).reshape(-1, x.shape[-1])
    return summed_cross_entropy(hidden, *model.head(), next_token_targets(labels).reshape(-1), model.is_frozen)
