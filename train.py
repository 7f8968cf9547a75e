"""Train a CustomLLM. With no arguments: preset `tiny` on the standard library's source code, in minutes on a CPU.

python train.py                                         # train, or resume the last run
python train.py --preset customllm-1b --recipe seed     # the source's run
python train.py --help                                  # every option
"""

from __future__ import annotations

from jaxllm.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before the imports that take seconds

import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxllm import flops
from jaxllm.checkpoint import Checkpoints
from jaxllm.compilation import use_compilation_cache
from jaxllm.config import TrainConfig
from jaxllm.data.stream import BatchShare, Prefetcher
from jaxllm.device import device_name, measured_peak_tflops, peak_memory
from jaxllm.errors import exit_on_user_error
from jaxllm.generate import Sampling, generate
from jaxllm.loss import IGNORED
from jaxllm.meter import Meter
from jaxllm.metrics import NoLog, RunLog, end_record, eval_record, step_record
from jaxllm.model.kernels import describe_kernels
from jaxllm.model.summary import module_tree
from jaxllm.parallel import (
    Programs,
    choose_layout,
    compile_programs,
    describe_layout,
    new_state,
    on_one_device,
    place,
    rows_here,
    state_shardings,
    unplaced,
)
from jaxllm.processes import (
    all_positions,
    end_if_shared,
    is_first,
    join,
    meet,
    only_first_speaks,
    prepare_together,
    total,
)
from jaxllm.run import announce, announce_finished, announce_speed, conclude, parse_args, write_samples
from jaxllm.sharding import Layout
from jaxllm.step import TrainState, model_graph


class Evaluator:
    """Mean cross-entropy over the held-out rows."""

    def __init__(self, config: TrainConfig, programs: Programs, rows: np.ndarray):
        short = -len(rows) % config.batch_size
        padded = np.concatenate([rows, np.full((short, rows.shape[1]), IGNORED, np.int32)])
        self._batches = padded.reshape(-1, config.batch_size, rows.shape[1])
        self._samples = len(rows)
        self._evaluate = programs.evaluate

    def __call__(self, state: TrainState, epoch: float, step: int) -> dict[str, float]:
        jax.block_until_ready(state)  # the clock starts behind the training
        start = time.perf_counter()
        sums = [self._evaluate(state, batch) for batch in self._batches]
        loss = sum(float(nll) for nll, _ in sums) / sum(int(count) for _, count in sums)
        seconds = time.perf_counter() - start
        return eval_record(loss, seconds, self._samples, len(self._batches), epoch, step)


def train(config: TrainConfig, layout: Layout, tokenizer, held_out: np.ndarray, resumes: bool) -> TrainState:
    """The training loop: from the last checkpoint, or from scratch, to `config.steps`."""
    graph = model_graph(config)
    checkpoints = Checkpoints(config.folder, config.keep_checkpoints)
    stream = BatchShare(config, tokenizer, *rows_here(config))
    if resumes and checkpoints.latest() is not None:
        state, positions = checkpoints.restore(config, state_shardings(config, layout))
        first_step = int(state.step)
        state = place(config, layout, state)
        if positions is not None:
            stream.seek(positions)
        print(f"Resuming from step {first_step} of {config.folder}")
    else:
        state, first_step = new_state(config, layout), 0
    announce(config, sum(flops.parameters(config.model).values()), module_tree(config.model), device_name())
    print(f"Layout: {describe_layout(config, layout)}")
    print(f"Kernels: {describe_kernels(config.model, config.precision)}")

    if first_step >= config.steps:
        announce_finished(first_step)
        checkpoints.close()
        return unplaced(config, layout, state)
    # measured before anything else is busy
    peak_tflops = layout.devices * (config.peak_tflops or measured_peak_tflops(config.precision))
    batches = Prefetcher(stream, config.grad_accum)  # fills up while the programs are compiled
    programs = compile_programs(config, graph, state, layout)
    evaluate = Evaluator(config, programs, held_out)
    meet("all have compiled")
    announce_speed(config, peak_tflops, programs.seconds)
    log = RunLog(config.folder, first_step, config.steps) if is_first() else NoLog()
    meter = Meter(config, peak_tflops, lambda: batches.waited)
    unlogged, all_losses = [], []
    epoch = 0.0
    try:
        for step in range(first_step + 1, config.steps + 1):
            batch = next(batches)
            labels = batch.rows.reshape(config.grad_accum, -1, config.seq_len)  # (A,B,T), of the rows B here
            state, metrics = programs.step(state, labels)
            unlogged.append(metrics.loss)
            if len(unlogged) > 1:
                unlogged[-2].block_until_ready()  # one step ahead of the device, so that the bar tells the truth
            epoch = step / config.steps if batch.progress is None else batch.progress
            last = step == config.steps
            log.bar.update()

            if step % config.log_every == 0 or last:
                losses = [float(loss) for loss in jax.device_get(unlogged)]  # waits for the device
                log.write(
                    step_record(
                        loss=float(np.mean(losses)),
                        grad_norm=float(metrics.grad_norm),
                        learning_rate=float(metrics.learning_rate),
                        epoch=epoch,
                        step=step,
                        expert_load=float(metrics.expert_load),
                        speed=meter.lap(len(losses)),
                        memory=peak_memory(),
                    )
                )
                all_losses += losses
                unlogged = []
            if step % config.eval_every == 0 or last:
                evaluation = evaluate(state, epoch, step)
                log.write(evaluation)
                meter.exclude(evaluation["eval_runtime"])
            if step % config.save_every == 0 or last:
                checkpoints.save(step, unplaced(config, layout, state), all_positions(batch.position))
        checkpoints.wait()
        steps_done = config.steps - first_step
        seconds, speed = meter.whole(steps_done)
        log.write(
            end_record(
                config,
                seconds=seconds,
                steps_done=steps_done,
                loss=float(np.mean(all_losses)),
                epoch=epoch,
                speed=speed,
                memory=peak_memory(),
                peak_tflops=peak_tflops,
                compile_seconds=programs.seconds,
            )
        )
    except BaseException as error:
        end_if_shared(error)
        raise
    finally:
        batches.close()
        log.close()
        checkpoints.close()  # an interrupted run keeps the checkpoint that is being written
    skipped_rows = total(stream.skipped_rows)
    if is_first():
        conclude(config, held_out, evaluation["eval_loss"], skipped_rows)
    return unplaced(config, layout, state)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    use_compilation_cache()
    config = parse_args(argv, "train.py", __doc__)
    join(config)
    layout = choose_layout(config)
    with only_first_speaks():
        config, tokenizer, held_out, resumes = prepare_together(config)
        state = train(config, layout, tokenizer, held_out, resumes)
        if config.sample_tokens and config.prompts:
            weights = on_one_device(layout, (state.params, state.routing_bias))
            del state  # the moments have had their day
            if is_first():
                write_samples(config, tokenizer, functools.partial(continue_prompts, config, *weights))
        meet("the end")
        print(f"\nEverything is in {Path(config.folder)}")


def continue_prompts(config: TrainConfig, params, routing_bias, prompts: list[list[int]], most: int) -> list[list[int]]:
    model = nnx.merge(model_graph(config), params, routing_bias)
    sampling, eos = Sampling(temperature=config.temperature, top_p=config.top_p), config.model.eos_token_id
    return generate(model, prompts, most, sampling, seed=config.seed, eos_token_id=eos)


if __name__ == "__main__":
    sys.exit(main())
