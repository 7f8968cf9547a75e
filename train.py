"""Train a CustomLLM. With no arguments: preset `tiny` on the standard library's source code, in minutes on a CPU.

python train.py                                         # train, or resume the last run
python train.py --preset customllm-1b --recipe seed     # the source's run
python train.py --help                                  # every option
"""

from __future__ import annotations

from jaxllm.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before the imports that take seconds

import contextlib
import functools
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from jaxllm import flops
from jaxllm.checkpoint import Checkpoints, SavedCheckpoint, check_room
from jaxllm.compilation import use_compilation_cache
from jaxllm.config import TrainConfig
from jaxllm.data.stream import BatchShare, Prefetcher
from jaxllm.device import device_name, measured_peak_tflops, peak_memory
from jaxllm.errors import Stopped, exit_on_user_error
from jaxllm.evaluation import Evaluator
from jaxllm.generate import Sampling, generate
from jaxllm.interrupt import stop_on_signals
from jaxllm.journal import Journal
from jaxllm.lock import FolderLock
from jaxllm.meter import Meter
from jaxllm.metrics import NoLog, RunLog, end_record, step_record, write_metrics
from jaxllm.model.kernels import describe_kernels
from jaxllm.model.summary import module_tree
from jaxllm.parallel import (
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
    least,
    meet,
    only_first_speaks,
    prepare_together,
    total,
)
from jaxllm.replay import replay
from jaxllm.run import announce, announce_finished, announce_speed, conclude, parse_args, write_samples
from jaxllm.sharding import Layout
from jaxllm.step import TrainState, model_graph
from jaxllm.watch import NotFiniteError, Watch


def train(config: TrainConfig, layout: Layout, tokenizer, held_out: np.ndarray, saved: int | None) -> TrainState:
    """The training loop: from the checkpoint of step `saved`, or from scratch, to `config.steps`."""
    graph = model_graph(config)
    stream = BatchShare(config, tokenizer, *rows_here(config))
    journal = Journal()
    if saved is not None:
        state, training = SavedCheckpoint(config.folder, saved).state(config, state_shardings(config, layout))
        first_step = int(state.step)
        state = place(config, layout, state)
        if training is not None:
            stream.seek(training.positions)
            journal = training.journal
        print(f"Resuming from step {first_step} of {config.folder}")
    else:
        state, first_step = new_state(config, layout), 0
    announce(config, sum(flops.parameters(config.model).values()), module_tree(config.model), device_name())
    print(f"Layout: {describe_layout(config, layout)}")
    print(f"Kernels: {describe_kernels(config.model, config.precision)}")

    if first_step >= config.steps:
        announce_finished(first_step)
        if journal.records and is_first():
            write_metrics(config.folder, journal.records)
        finish(config, held_out, journal, stream)
        return unplaced(config, layout, state)
    check_room(config)
    # measured before anything else is busy
    peak_tflops = layout.devices * (config.peak_tflops or measured_peak_tflops(config.precision))
    position, progress = stream.position(), stream.progress()
    batches = Prefetcher(stream, config.grad_accum)  # fills up while the programs are compiled
    programs = compile_programs(config, graph, state, layout)
    evaluate = Evaluator(config, programs, held_out)
    meet("all have compiled")
    announce_speed(config, peak_tflops, programs.seconds)
    checkpoints = Checkpoints(config.folder, keep=config.keep_checkpoints, keep_every=config.keep_every)
    log = RunLog(config.folder, journal, first_step, config.steps) if is_first() else NoLog(journal)
    meter = Meter(config, peak_tflops, lambda: batches.waited)
    watch = Watch(config, journal, log)
    step = logged_step = saved_step = first_step
    stopped = False

    def epoch() -> float:
        """Passes over the data, by the slowest of all its streams; of the steps where the data has no known size."""
        return step / config.steps if progress is None else least(progress)

    def evaluate_if_due() -> None:
        """Also what a signal has interrupted: then the last evaluation lies before this step."""
        due = step > 0 and (step % config.eval_every == 0 or step == config.steps)
        if not due or step in (record["step"] for record in journal.records if "eval_loss" in record):
            return
        record = evaluate(state, epoch(), step, lambda: step < config.steps and stop_asked.at_once)
        if record is not None:
            log.write(record)
            meter.exclude(record["eval_runtime"])

    def save_once() -> None:
        nonlocal saved_step
        watch.settle(behind=0)  # the journal that is saved knows this step
        if step > saved_step:
            checkpoints.save(step, unplaced(config, layout, state), all_positions(position), journal)
            saved_step = step

    try:
        with stop_on_signals() as stop_asked:
            evaluate_if_due()
            stopped = stop_asked.at_once
            while step < config.steps and not stopped:
                batch = batches.take(lambda: stop_asked.at_once)
                if batch is None:  # a signal came while the data did not
                    stopped = True
                    save_once()
                    break
                labels = batch.rows.reshape(config.grad_accum, -1, config.seq_len)  # (A,B,T), of the rows B here
                state, metrics = programs.step(state, labels)
                step += 1
                watch.add(step, metrics, position)
                position, progress = batch.position, batch.progress
                log.bar.update()
                stopped, last = stop_asked(step), step == config.steps
                logs, evaluates, saves = (
                    step % every == 0 or last for every in (config.log_every, config.eval_every, config.save_every)
                )
                watch.settle(behind=0 if logs or evaluates or saves or stopped else 1)

                if logs:
                    log.write(
                        step_record(
                            loss=journal.take_mean_loss(),
                            grad_norm=float(metrics.grad_norm),
                            learning_rate=float(metrics.learning_rate),
                            epoch=epoch(),
                            step=step,
                            expert_load=float(metrics.expert_load),
                            speed=meter.lap(step - logged_step),
                            memory=peak_memory(),
                        )
                    )
                    logged_step = step
                evaluate_if_due()
                stopped = stopped or stop_asked.at_once  # an evaluation that was interrupted is due at the next start
                if last:
                    seconds, speed = meter.whole(step - first_step)
                    log.write(
                        end_record(
                            config,
                            seconds=seconds,
                            steps_done=step - first_step,
                            loss=journal.mean_loss(),
                            epoch=epoch(),
                            nonfinite_steps=journal.nonfinite_steps,
                            speed=speed,
                            memory=peak_memory(),
                            peak_tflops=peak_tflops,
                            compile_seconds=programs.seconds,
                        )
                    )
                if saves or stopped:
                    save_once()
            checkpoints.wait()
    except BaseException as error:
        if isinstance(error, NotFiniteError):  # which all processes meet at the same step
            checkpoints.close()
        end_if_shared(error)
        with contextlib.suppress(OSError):  # the error that led here comes first
            log.close()
        raise
    finally:
        batches.close()
        checkpoints.close()  # an interrupted run keeps the checkpoint that is being written
        log.close()
    if stopped and step < config.steps:
        raise Stopped(
            f"stopped behind step {step} of {config.steps}, and saved: the same command "
            f"{'without --overwrite ' if config.overwrite else ''}goes on from there",
            code=128 + (stop_asked.signal or signal.SIGTERM),
        )
    finish(config, held_out, journal, stream)
    return unplaced(config, layout, state)


def finish(config: TrainConfig, held_out: np.ndarray, journal: Journal, stream: BatchShare) -> None:
    """What a finished run says of its result, and its picture."""
    skipped_rows = total(stream.skipped_rows)
    if is_first() and journal.records:
        last = next((r["eval_loss"] for r in reversed(journal.records) if "eval_loss" in r), None)
        conclude(config, held_out, math.nan if last is None else last, skipped_rows)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    use_compilation_cache()
    config = parse_args(argv, "train.py", __doc__)
    join(config)
    layout = choose_layout(config)
    with only_first_speaks(), FolderLock(config.folder) as lock:
        (config, tokenizer, held_out, _), saved = prepare_together(config, lock)
        if config.replay is not None:
            replay(config, layout, tokenizer, saved)
            return
        state = train(config, layout, tokenizer, held_out, saved)
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
