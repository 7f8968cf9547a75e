"""A run of train.py: its folder and lock, its data, history and checkpoints, and what happens around its steps."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import TrainConfig
from jaxllm.data.prefetch import Batch, Prefetcher
from jaxllm.data.sources import open_source
from jaxllm.data.stream import ProcessBatches
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.errors import Stopped, UserError
from jaxllm.files import write_json
from jaxllm.model import flops
from jaxllm.model.decoder import count_parameters
from jaxllm.model.kernels import describe_kernels
from jaxllm.model.summary import module_tree
from jaxllm.run.evaluation import Evaluator
from jaxllm.run.hardware import bfloat16_hardware
from jaxllm.run.metrics import NoLog, RunLog, end_record, step_record
from jaxllm.run.monitor import NotFiniteError, StepMonitor
from jaxllm.run.prepare import Prepared, keep_left_out, prepare
from jaxllm.run.processes import (
    abort_if_multiprocess,
    all_check,
    all_gather,
    all_have,
    all_min,
    all_positions,
    all_sum,
    barrier,
    is_primary,
    num_processes,
    primary_result,
    silence_non_primary,
)
from jaxllm.run.reporting import announce, announce_adapters, announce_finished, announce_speed, conclude
from jaxllm.run.runtime import device_name, measured_peak_tflops, peak_memory
from jaxllm.run.self_check import kernels_to_avoid
from jaxllm.run.signals import stop_on_signals
from jaxllm.run.throughput import Meter, TokenFlops, reference_peak
from jaxllm.store.base import BASE_FILE
from jaxllm.store.checkpoint import CheckpointReader, delete_unfinished, quarantine
from jaxllm.store.checkpoint_writer import CheckpointWriter, check_room
from jaxllm.store.folder import SOURCE_DTYPES, TOKENIZER
from jaxllm.store.history import History
from jaxllm.store.lock import FolderLock
from jaxllm.store.metrics_file import write_metrics
from jaxllm.store.resume import choose_checkpoint
from jaxllm.train.placement import Placement, local_rows
from jaxllm.train.state import TrainState
from jaxllm.train.step import StepMetrics
from jaxllm.train.trainer import Trainer


class Run:
    """A run, begun in a new folder or resumed from its newest checkpoint, until it ends or is stopped.

    `open` makes it, with its trainer and state, and cleans up at the end. `train.py` shows the order of the calls:
    `batches`, for each batch `add_step` and what is due, then `finish`.

    Attributes:
        config: the run's, aligned with the tokenizer.
        tokenizer: the run's.
        step: steps done.
    """

    def __init__(
        self,
        prepared: Prepared[TrainConfig],
        trainer: Trainer,
        stream: ProcessBatches,
        history: History,
        step: int,
        cleanup: contextlib.ExitStack,
    ):
        """Compile the programs, and start what surrounds the steps; `cleanup` ends it."""
        config, checkpoint = prepared.config, prepared.config.checkpoint
        self.config, self.tokenizer, self._prepared = config, prepared.tokenizer, prepared
        self.step = self._first_step = self._logged_step = self._saved_step = step
        self._stream, self._history, self._cleanup = stream, history, cleanup
        # measured before anything else is busy
        kind = jax.devices()[0].device_kind
        peak = reference_peak(config.logging.peak_tflops, config.decided_precision, kind, measured_peak_tflops)
        self._peak = peak.of_devices(trainer.placement.layout.devices)
        self._position, self._progress = stream.position(), stream.progress()
        self._prefetcher = Prefetcher(stream, config.data.grad_accum)  # fills while the programs are compiled
        cleanup.callback(self._prefetcher.close)
        self._compile_seconds = trainer.compile()
        self._evaluator = Evaluator(trainer, prepared)
        barrier("compiled")
        token_flops = TokenFlops.of(config.model, config.data.seq_len, frozen=config.adapters is not None)
        announce_speed(token_flops, self._peak, self._compile_seconds)
        self._log = RunLog(config, history, step) if is_primary() else NoLog(history)
        cleanup.push(self._log)
        # an interrupted run keeps the checkpoint that is being written
        self._writer = CheckpointWriter(
            config.folder, keep=checkpoint.keep_checkpoints, keep_every=checkpoint.keep_every
        )
        cleanup.push(self._close_writer)
        self._monitor = StepMonitor(history, self._log, checkpoint.max_nonfinite)
        self._meter = Meter(
            config.tokens_per_step, token_flops, self._peak.tflops, waited=lambda: self._prefetcher.waited
        )
        self._stop, self._stop_after_step = cleanup.enter_context(stop_on_signals()), False

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, config: TrainConfig, placement: Placement, read_start: Callable[[TrainConfig, Any], Any]
    ) -> Iterator[tuple[Run, Trainer, TrainState]]:
        """Lock and prepare the folder of a run, restore or initialize its state, and release everything at the end.

        `read_start` reads the weights to start from, into their shardings (`convert.to_flax.Imported`; None: random
        weights).

        Raises:
            UserError: the folder, the data, the tokenizer or a prompt does not fit the config, or all checkpoints are
                damaged; before anything is deleted.
        """
        starts = [read_start(config, placement.weight_shardings(config.model))]  # before an earlier run is deleted
        if config.adapters:
            config = config.with_options(lora_base_dtype=starts[0].matrix_dtype)
        with silence_non_primary(), FolderLock(config.folder) as lock:
            bfloat16 = all_have(bfloat16_hardware())
            prepared, resume_step = _prepare_together(config, lock, bfloat16)
            try:
                with contextlib.ExitStack() as cleanup:
                    # no reference here keeps the state or its first weights alive
                    yield _start(prepared, resume_step, placement, starts.pop(), bfloat16, cleanup)
            except BaseException as error:
                if not isinstance(error, Stopped):
                    abort_if_multiprocess(error)
                raise

    def batches(self) -> Iterator[Batch]:
        """This process's rows of each batch to come; ends after the last step, or when a signal asks for it."""
        while not (self.finished or self._stopped):
            if (batch := self._prefetcher.take(lambda: self._stop.at_once)) is not None:
                yield batch

    def _close_writer(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # Other errors may have occurred in this process only: waiting for the others might never end.
        if error is None or isinstance(error, NotFiniteError | Stopped) or num_processes() == 1:
            self._writer.close()

    def add_step(self, batch: Batch, metrics: StepMetrics) -> None:
        """Count a step that was given to the device, and record the finished ones (`StepMonitor.flush`)."""
        self.step += 1
        self._monitor.add(self.step, metrics, self._position)
        self._position, self._progress = batch.position, batch.progress
        self._log.bar.update()
        self._stop_after_step = self._stop.after_step(self.step)
        due = self._stopped or self.log_due or self.evaluation_due or self.save_due
        self._monitor.flush(max_pending=0 if due else 1)

    @property
    def _stopped(self) -> bool:
        """Whether a signal asked to stop here."""
        return self._stop_after_step or self._stop.at_once

    @property
    def log_due(self) -> bool:
        return self._due(self.config.logging.log_every)

    @property
    def evaluation_due(self) -> bool:
        return self._due(self.config.logging.eval_every)

    @property
    def save_due(self) -> bool:
        return self._stopped or self._due(self.config.checkpoint.save_every)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step == self.config.schedule.steps

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.finished

    def log(self, metrics: StepMetrics) -> None:
        """Write the training line of this step."""
        self._log.write(
            step_record(
                self.step,
                self._epoch(),
                loss=self._history.pop_mean_loss(),
                grad_norm=float(metrics.grad_norm),
                learning_rate=float(metrics.learning_rate),
                expert_load=float(metrics.expert_load),
                speed=self._meter.lap(self.step - self._logged_step),
                memory=peak_memory(),
            )
        )
        self._logged_step = self.step

    def evaluate(self, state: TrainState) -> None:
        """Evaluate at this step if it is due and not done yet. A signal interrupts it; the next start repeats it."""
        if self.step == 0 or not self.evaluation_due or str(self.step) in self._history.evaluations:
            return
        record = self._evaluator(state, self._epoch(), self.step, lambda: not self.finished and self._stop.at_once)
        if record is not None:
            self._log.write(record)
            self._meter.exclude(record["eval_runtime"])

    def log_totals(self) -> None:
        """Write the last line of the run."""
        self._log.write(
            end_record(
                self.config,
                self._epoch(),
                totals=self._meter.totals(self.step - self._first_step),
                loss=self._history.mean_loss(),
                memory=peak_memory(),
                peak_tflops=self._peak.tflops,
                nonfinite_steps=self._history.nonfinite_steps,
                compile_seconds=self._compile_seconds,
            )
        )

    def save(self, trainer: Trainer, state: TrainState) -> None:
        """Save this step in the background, unless it is saved already."""
        self._monitor.flush(max_pending=0)  # the history that is saved includes this step
        if self.step > self._saved_step:
            if (left_out := all_gather(self._stream.left_out)) and is_primary():
                keep_left_out(self.config, left_out)
            self._writer.save(self.step, trainer.unshard(state), all_positions(self._position), self._history)
            self._saved_step = self.step

    def finish(self, trainer: Trainer, state: TrainState) -> None:
        """Save what is not saved, wait for it, and report the result. Raises Stopped if a signal ended the run."""
        self.save(trainer, state)
        self._writer.wait()
        self._cleanup.close()  # the progress bar would be drawn among the lines to come
        if self._stopped and not self.finished:
            raise Stopped(
                f"stopped after step {self.step} of {self.config.schedule.steps}, and saved: the same command "
                f"{'without --overwrite ' if self.config.overwrite else ''}resumes from there",
                code=self._stop.exit_code,
            )
        self._conclude()

    def _conclude(self) -> None:
        skipped_rows = all_sum(self._stream.skipped_rows)
        left_out = all_gather(self._stream.left_out)
        if is_primary() and self._history.records:
            conclude(self._prepared, self._history.last_evaluation(), skipped_rows, left_out)

    def _epoch(self) -> float:
        """Passes over the data by the slowest stream; for data of unknown size, the share of steps that are done."""
        return self.step / self.config.schedule.steps if self._progress is None else all_min(self._progress)


class FinishedRun(Run):
    """A run that is complete already: it trains nothing and prints its result again."""

    def __init__(self, prepared: Prepared[TrainConfig], stream: ProcessBatches, history: History, step: int):
        self.config, self.tokenizer, self._prepared = prepared.config, prepared.tokenizer, prepared
        self._stream, self._history, self.step = stream, history, step

    def batches(self) -> Iterator[Batch]:
        return iter(())

    def finish(self, trainer: Trainer, state: TrainState) -> None:
        self._conclude()


def _start(
    prepared: Prepared[TrainConfig],
    resume_step: int | None,
    placement: Placement,
    start: Any,
    bfloat16: str | None,
    cleanup: contextlib.ExitStack,
) -> tuple[Run, Trainer, TrainState]:
    """A run in its prepared folder, from the checkpoint of `resume_step` or from the beginning."""
    config = prepared.config
    local, history = local_rows(config.data.batch_size), History()
    stream = ProcessBatches(config.data, config.seed, config.data_streams, prepared.tokenizer, *local)
    without = kernels_to_avoid(config.model, jnp.dtype(config.decided_precision), config.kernels, config.adapters)
    trainer = Trainer(config, placement, without)
    if resume_step is None:
        step = 0
        if config.adapters:
            state = trainer.init_adapted(start.weights, start.adapters)
        else:
            state = trainer.init(start and start.weights)
    else:
        saved = CheckpointReader(config.folder, resume_step)
        state, resumed = saved.state(trainer.computation, trainer.state_shardings)
        step = int(state.step)
        if resumed is not None:
            stream.seek(resumed.positions)
            history = resumed.history
        print(f"Resuming from step {step} of {config.folder}")
        if config.adapters:
            state = trainer.with_base(state, start.weights)
        state = placement.shard(state)
    if start is not None and is_primary():
        write_json(config.folder / SOURCE_DTYPES, start.dtypes)
        if config.adapters and resume_step is None:
            write_json(config.folder / BASE_FILE, {"sha256": start.sha256})
    del start  # the state has its own weights
    tree = module_tree(config.model) if step == 0 else None
    announce(config, sum(flops.parameters(config.model).values()), tree, device_name(), bfloat16)
    print(f"Layout: {placement.describe()}")
    dtype, lora = jnp.dtype(config.decided_precision), config.adapters
    print(f"Kernels: {describe_kernels(config.model, dtype, lora=lora, without=without)}")
    if config.adapters:
        rate, warmup = config.optim.learning_rate, config.schedule.warmup_steps
        announce_adapters(config.adapters, rate, warmup, count_parameters(trainer.computation.state.params))
    if step >= config.schedule.steps:
        announce_finished(step)
        if history.records and is_primary():
            write_metrics(config.folder, history.records)
        return FinishedRun(prepared, stream, history, step), trainer, state
    check_room(config.folder, trainer.computation.state)
    run = Run(prepared, trainer, stream, history, step, cleanup)
    run.evaluate(state)  # the evaluation that a signal interrupted before this start
    return run, trainer, state


def _prepare_together(
    config: TrainConfig, lock: FolderLock, bfloat16: str | None
) -> tuple[Prepared[TrainConfig], int | None]:
    """`prepare` for all processes: the primary one does it, the others read what it has written.

    Returns:
        What was prepared, and the step of the checkpoint to resume from; None: from the start.

    Raises:
        UserError: as `prepare` and `choose_checkpoint`; or a process does not see the data or the run's folder.
    """

    def prepare_and_choose() -> tuple[Prepared[TrainConfig], int | None]:
        made = prepare(config, "JAX", lock, num_processes(), bfloat16)
        if not made.resumes:
            return made, None
        chosen = choose_checkpoint(config.folder, strict=config.checkpoint.strict)
        quarantine(config.folder, chosen.damaged)
        delete_unfinished(config.folder)
        return made, chosen.step

    if num_processes() == 1:
        return prepare_and_choose()
    all_check(lambda: open_source(config.data, config.seed))
    folder = config.folder.absolute().parent
    token = Path(primary_result(lambda: _create_token(folder)))

    def check_folder() -> None:
        if not token.is_file():
            raise UserError(f"run_dir is {str(config.folder)!r}: it must be on a disk that all processes share")

    try:
        all_check(check_folder)
    finally:
        if is_primary():
            token.unlink()

    def work() -> dict[str, Any]:
        made, step = prepare_and_choose()
        held_out = made.held_out.tolist()
        return {"config": made.config.to_dict(), "held_out": held_out, "resumes": made.resumes, "step": step}

    made = primary_result(work)
    config = TrainConfig.from_dict(made["config"]).with_options(run_dir=config.folder)
    tokenizer = load_tokenizer(str(config.folder / TOKENIZER))
    return Prepared(config, tokenizer, np.asarray(made["held_out"], np.int32), made["resumes"]), made["step"]


def _create_token(folder: Path) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".jaxllm-", dir=folder)
    except OSError as error:
        raise UserError(f"run_dir: nothing can be written to {folder}: {error.strerror}") from None
    os.close(handle)
    return name
