"""Train a CustomLLM. With no arguments: preset `tiny` on the standard library's source code, in minutes on a CPU.

python train.py                                         # train, or resume the last run
python train.py --preset customllm-1b --recipe seed     # the source's run
python train.py --help                                  # every option
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxllm.checkpoint import Checkpoints
from jaxllm.config import TrainConfig
from jaxllm.data.corpus import open_source
from jaxllm.data.stream import Prefetcher, TokenStream
from jaxllm.errors import exit_on_user_error
from jaxllm.generate import Sampling, generate
from jaxllm.loss import IGNORED
from jaxllm.metrics import RunLog, end_record, eval_record, step_record
from jaxllm.model.summary import module_tree
from jaxllm.run import announce, announce_finished, conclude, parse_args, prepare, write_samples
from jaxllm.step import TrainState, count_parameters, eval_step, init_state, model_graph, train_step


class Evaluator:
    """Mean cross-entropy over the held-out rows."""

    def __init__(self, config: TrainConfig, graph: nnx.GraphDef, rows: np.ndarray):
        short = -len(rows) % config.batch_size
        padded = np.concatenate([rows, np.full((short, rows.shape[1]), IGNORED, np.int32)])
        self._batches = padded.reshape(-1, config.batch_size, rows.shape[1])
        self._samples = len(rows)
        self._step = jax.jit(functools.partial(eval_step, graph))

    def __call__(self, state: TrainState, epoch: float) -> dict[str, float]:
        start = time.perf_counter()
        sums = [self._step(state.params, state.routing_bias, batch) for batch in self._batches]
        loss = sum(float(nll) for nll, _ in sums) / sum(int(count) for _, count in sums)
        seconds = time.perf_counter() - start
        return eval_record(loss, seconds, self._samples, len(self._batches), epoch, int(state.step))


def train(config: TrainConfig, tokenizer, held_out: np.ndarray, resumes: bool) -> TrainState:
    """The training loop: from the last checkpoint, or from scratch, to `config.steps`."""
    graph = model_graph(config)
    checkpoints = Checkpoints(config.folder, config.keep_checkpoints)
    stream = TokenStream(open_source(config), tokenizer, config.seq_len, config.seed)
    if resumes and checkpoints.latest() is not None:
        state, position = checkpoints.restore(config)
        if position is not None:
            stream.seek(position)
        print(f"Resuming from step {int(state.step)} of {config.folder}")
    else:
        state = jax.jit(functools.partial(init_state, config))()
    device = f"{jax.devices()[0].device_kind} ({jax.default_backend()})"
    announce(config, count_parameters(state.params), module_tree(config.model), device)

    first_step = int(state.step)
    if first_step >= config.steps:
        announce_finished(first_step)
        checkpoints.close()
        return state
    step_fn = jax.jit(functools.partial(train_step, config, graph), donate_argnums=0)
    evaluate = Evaluator(config, graph, held_out)
    log = RunLog(config.folder, first_step, config.steps)
    rows_per_step = config.grad_accum * config.batch_size
    batches = Prefetcher(stream, rows_per_step)
    unlogged, all_losses = [], []
    epoch = 0.0
    started = logged = time.perf_counter()
    try:
        for step in range(first_step + 1, config.steps + 1):
            batch = next(batches)
            labels = batch.rows.reshape(config.grad_accum, config.batch_size, config.seq_len)
            state, metrics = step_fn(state, labels)
            unlogged.append(metrics.loss)
            if len(unlogged) > 1:
                unlogged[-2].block_until_ready()  # one step ahead of the device, so that the bar tells the truth
            epoch = step / config.steps if batch.progress is None else batch.progress
            last = step == config.steps
            log.bar.update()

            if step % config.log_every == 0 or last:
                losses = [float(loss) for loss in jax.device_get(unlogged)]  # waits for the device
                now = time.perf_counter()
                log.write(
                    step_record(
                        loss=float(np.mean(losses)),
                        grad_norm=float(metrics.grad_norm),
                        learning_rate=float(metrics.learning_rate),
                        epoch=epoch,
                        step=step,
                        tokens_per_second=len(losses) * config.tokens_per_step / (now - logged),
                        expert_load=float(metrics.expert_load),
                    )
                )
                all_losses += losses
                unlogged, logged = [], now
            if step % config.eval_every == 0 or last:
                evaluation = evaluate(state, epoch)
                log.write(evaluation)
                logged = time.perf_counter()
            if step % config.save_every == 0 or last:
                checkpoints.save(state, batch.position)
        checkpoints.wait()
        seconds = time.perf_counter() - started
        log.write(end_record(config, seconds, config.steps - first_step, float(np.mean(all_losses)), epoch))
    finally:
        batches.close()
        log.close()
        checkpoints.close()  # an interrupted run keeps the checkpoint that is being written
    conclude(config, held_out, evaluation["eval_loss"], stream.skipped_rows)
    return state


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    config, tokenizer, held_out, resumes = prepare(parse_args(argv, "train.py", __doc__), "JAX")
    state = train(config, tokenizer, held_out, resumes)
    model = nnx.merge(model_graph(config), state.params, state.routing_bias)
    sampling = Sampling(temperature=config.temperature, top_p=config.top_p)
    eos = config.model.eos_token_id
    write_samples(
        config,
        tokenizer,
        lambda prompts, most: generate(model, prompts, most, sampling, seed=config.seed, eos_token_id=eos),
    )
    print(f"\nEverything is in {Path(config.folder)}")


if __name__ == "__main__":
    sys.exit(main())
