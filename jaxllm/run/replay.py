"""Compute one step of a run again, and report where its first value that is not finite appears.

python -m jaxllm.run.replay RUN STEP

The run is repeated, without changing anything, from the newest checkpoint before that step: same weights, same batches,
same dropout. Then everything that the step computes is checked in the order in which it is computed. On a mesh the
steps before are computed as they were; the step itself is checked on one device, and may differ by rounding.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from safetensors.numpy import save_file
from tqdm import tqdm

from jaxllm.command_line import parse
from jaxllm.config import TrainConfig
from jaxllm.config.fields import check_fields, option
from jaxllm.config.groups import OptimConfig
from jaxllm.data.stream import ProcessBatches
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.errors import UserError, exit_on_user_error
from jaxllm.files import StrPath, write_text_atomically
from jaxllm.model.batch import TokenBatch, token_batch
from jaxllm.model.decoder import STACKS, token_positions
from jaxllm.run.runtime import start_jax, use_compilation_cache
from jaxllm.run.self_check import kernels_to_avoid
from jaxllm.store.checkpoint import CheckpointReader
from jaxllm.store.folder import TOKENIZER, checkpoint_steps, read_config
from jaxllm.store.lock import FolderLock
from jaxllm.store.resume import choose_checkpoint
from jaxllm.train.placement import local_rows, on_one_device
from jaxllm.train.state import TrainState
from jaxllm.train.step import dropout_keys, gradients
from jaxllm.train.trainer import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Array = jax.Array


class Found(NamedTuple):
    """A tensor of the step that holds values that are not finite."""

    where: str
    micro_batch: int | None = None
    row: int | None = None
    token: int | None = None  # of the row
    tokens: int | None = None  # number of tokens of the micro-batch with such values


@dataclass(frozen=True)
class ReplayArgs:
    """Compute one step of a run again, and report where its first value that is not finite appears."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    step: Annotated[int, tyro.conf.Positional] = option(ge=1)
    """Number of the step, from 1."""

    def __post_init__(self) -> None:
        check_fields(self)


def replay(folder: StrPath, step: int) -> None:
    """Replay a step of the run in a folder.

    Prints what it finds and writes RUN/replay/STEP/: `batch.safetensors` (`TokenBatch`, (A,B,T)), `report.json`.

    Raises:
        UserError: the run does not exist, it has no checkpoint before that step, or the step is beyond the run's end.
    """
    folder = Path(folder)
    config = read_config(folder, TrainConfig)
    if step > config.schedule.steps:
        raise UserError(f"step is {step}: the run in {folder} has {config.schedule.steps} steps")
    if config.adapters:
        raise UserError(
            f"{str(folder)!r} trains adapters, whose frozen weights a replay does not read: merge them with `python -m "
            "convert to-torch RUN OUT --merge`, and look at the model with `python -m jaxllm.evaluate`"
        )
    with FolderLock(folder) as lock:
        lock.take()
        steps, saved = checkpoint_steps(folder), choose_checkpoint(folder, before=step).step
        if saved is None and steps:
            raise UserError(
                f"step is {step}: the oldest checkpoint that is left is that of step {steps[0]}: pass a later step"
            )
        if saved is None and config.init is not None:
            raise UserError(
                f"step is {step}: the run started from the weights of {config.init}, and has no checkpoint before that "
                "step: pass a later step"
            )
        tokenizer = load_tokenizer(str(folder / TOKENIZER))
        _replay(config, tokenizer, step, saved)


def _replay(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, step: int, saved: int | None) -> None:
    without = kernels_to_avoid(config.model, jnp.dtype(config.decided_precision), config.kernels, config.adapters)
    trainer, local = Trainer(config, without=without), local_rows(config.data.batch_size)
    stream = ProcessBatches(config.data, config.seed, config.data_streams, tokenizer, *local)
    if saved is None:
        state = trainer.init()
    else:
        checkpoint = CheckpointReader(config.folder, saved)
        state, resumed = checkpoint.state(trainer.computation, trainer.state_shardings)
        state = trainer.placement.shard(state)
        if resumed is not None:
            stream.seek(resumed.positions)
    print(f"Replaying step {step} of {config.folder} from step {saved or 0}")
    if steps := range((saved or 0) + 1, step):
        for _ in tqdm(steps, unit="step", dynamic_ncols=True, disable=None):
            state, _ = trainer.step(state, stream.next_rows(config.data.grad_accum))
    rows = stream.next_rows(config.data.grad_accum).reshape(config.data.grad_accum, -1, config.data.seq_len)
    batch = token_batch(rows, config.data)
    state = on_one_device(trainer.placement.layout, trainer.unshard(state))
    found, loss = examine(config.optim, trainer.graph, state, batch)
    _report(config.folder, tokenizer, step, batch, found, loss)


def examine(optim: OptimConfig, graph: nnx.GraphDef, state: TrainState, batch: TokenBatch) -> tuple[list[Found], float]:
    """Tensors of a step on a batch (A,B,T) that are not finite, in the order of computation; and the step's loss."""
    found: list[Found] = []
    for index in range(len(batch.ids)):
        micro = jax.tree.map(lambda rows, index=index: rows[index], batch)
        for where, bad in _in_order(_forward(graph, state, micro, index)):
            if bad.any():
                row, token = np.argwhere(bad)[0].tolist()
                found.append(Found(where, index, row, token, int(bad.sum())))
    grads, loss, _ = jax.jit(functools.partial(gradients, optim, graph))(state, batch)
    if not np.isfinite(loss):
        found.append(Found("loss"))
    found += [Found(f"gradient of {name}") for name in _bad_leaves(grads)]
    norms = jnp.sqrt(sum(jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(grads)))
    if np.isfinite(loss) and not np.isfinite(norms) and not any(f.where.startswith("gradient") for f in found):
        found.append(Found("gradient norm (the sum of the squares is too large for float32)"))
    return found, float(loss)


PARTS = ("input norm", "attention", "post-attention norm", "router scores", "experts", "residual")
"""What a layer computes, in that order."""


class _Bad(NamedTuple):
    """In which tokens the tensors of a forward pass on (B,T) are not finite."""

    embeddings: Array  # (B,T)
    layers: list[Array]  # of PARTS, each (L,B,T); of the router's, L are the layers with experts, the last ones
    final_norm: Array  # (B,T)
    logits: Array  # (B,T)


@functools.partial(jax.jit, static_argnums=0)
def _forward(graph: nnx.GraphDef, state: TrainState, micro: TokenBatch, index: Array) -> _Bad:
    """The forward pass of micro-batch `index` (B,T), as the step computes it."""
    model = nnx.merge(graph, state.params, state.routing_bias)
    ids = jnp.maximum(micro.ids, 0)
    keys = dropout_keys(state, index, len(ids), jnp.arange(len(ids))) if model.config.dropout else None
    x, aux = model.hidden_states(ids, micro.documents, dropout_keys=keys, keep_trace=True)
    trace = aux.trace
    scores = jnp.zeros((0, *ids.shape, 1)) if trace.routing is None else trace.routing.scores
    parts = (trace.input_norm, trace.attention, trace.post_attn_norm, scores, trace.mixture, trace.residual)

    def bad(tensor: Array, *layers: int) -> Array:  # (...,B,T,D) or (...,B*T,D) -> (...,B,T)
        return ~jnp.isfinite(tensor).reshape(*layers, *ids.shape, tensor.shape[-1]).all(-1)

    return _Bad(
        bad(model.embed(ids, token_positions(ids, micro.documents))),
        [bad(part, len(part)) for part in parts],
        bad(model.apply_final_norm(x)),
        # row by row: the logits of a whole micro-batch may not fit
        jax.lax.map(lambda row: ~jnp.isfinite(model.logits(row[None])[0]).all(-1), x),
    )


def _in_order(bad: _Bad) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor's name with its tokens (B,T), in the order in which they are computed."""
    yield "embeddings", np.asarray(bad.embeddings)
    layers = [np.asarray(rows) for rows in bad.layers]
    count = len(layers[0])
    for layer in range(count):
        for part, rows in zip(PARTS, layers, strict=True):
            if (index := layer - count + len(rows)) >= 0:
                yield f"layer {layer}: {part}", rows[index]
    yield "final norm", np.asarray(bad.final_norm)
    yield "logits", np.asarray(bad.logits)


def _bad_leaves(grads: Any) -> list[str]:
    """Names of the parameters whose gradient is not finite, in the order of the backward pass: the head first."""
    names, first = [], {}  # the number of the first layer of each stack
    for stack in STACKS:
        first[stack] = sum(len(jax.tree.leaves(grads[before])[0]) for before in first if before in grads)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        keys = [str(getattr(key, "key", key)) for key in path]
        if keys[0] in STACKS:
            finite = np.asarray(jnp.isfinite(grad).reshape(len(grad), -1).all(-1))  # (L,)
            layers = (first[keys[0]] + int(layer) for layer in np.flatnonzero(~finite))
            names += [(1 + layer, ".".join([keys[0], str(layer), *keys[1:]])) for layer in layers]
        elif not bool(jnp.isfinite(grad).all()):
            names.append((0 if keys[0].endswith("embeddings") else 1 << 30, ".".join(keys)))
    return [name for _, name in sorted(names, key=lambda found: -found[0])]


def _report(
    run: Path, tokenizer: PreTrainedTokenizerBase, step: int, batch: TokenBatch, found: list[Found], loss: float
) -> None:
    folder = run / "replay" / str(step)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"labels": batch.labels, "ids": batch.ids, "documents": batch.documents}
    save_file(
        {name: np.ascontiguousarray(a, np.int32) for name, a in arrays.items() if a is not None},
        folder / "batch.safetensors",
    )
    text = None
    print(f"Step {step}: loss {loss}")
    if not found:
        print("Everything in it is finite")
    else:
        first = found[0]
        place = ""
        if first.row is not None and first.token is not None:
            row = batch.ids[first.micro_batch, first.row]
            text = tokenizer.decode(row[max(0, first.token - 8) : first.token + 1].tolist())
            place = (
                f", micro-batch {first.micro_batch}, row {first.row}, token {first.token} "
                f"(id {row[first.token]}, after {text!r}), and at {first.tokens} tokens in all"
            )
        print(f"The first value that is not finite: {first.where}{place}")
        for other in found[1:]:
            print(f"  then {other.where}")
    report = {
        "step": step, "loss": str(loss), "first_at_text": text, "nonfinite": [f._asdict() for f in found],
    }  # fmt: skip
    write_text_atomically(folder / "report.json", json.dumps(report, indent=1) + "\n")
    print(f"The batch and this report are in {folder}")


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    args: ReplayArgs = parse(ReplayArgs, argv, "python -m jaxllm.run.replay", __doc__)
    start_jax()
    use_compilation_cache()
    replay(args.run, args.step)


if __name__ == "__main__":
    sys.exit(main())
