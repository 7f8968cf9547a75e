"""What happens around the Trainer's steps: when to log, evaluate and save; routing bias, log, MPS memory, samples."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from jaxllm.config import RunConfig
from jaxllm.run.metrics import RunLog, end_record, eval_record, step_record
from jaxllm.run.reporting import conclude, write_samples
from jaxllm.run.throughput import GIB, Meter
from torch_ref.batches import MicroBatches
from torch_ref.device import peak_memory
from torch_ref.generate import generate
from torch_ref.model import CustomLLM
from torch_ref.step import tokens_per_expert, update_routing_bias


class ScheduleCallback(TrainerCallback):
    """Logs, evaluates and saves at train.py's steps: every so many of them, and at the last."""

    def __init__(self, config: RunConfig):
        self._config = config

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        # The Trainer wants to find this key when it saves; a state that the converter wrote does not have it.
        callbacks: Any = state.stateful_callbacks
        callbacks.setdefault("TrainerControl", control.state())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        config, step = self._config, state.global_step
        last = step >= config.schedule.steps
        control.should_log = last or step % config.logging.log_every == 0
        control.should_evaluate = last or step % config.logging.eval_every == 0
        control.should_save = last or step % config.checkpoint.save_every == 0


class RoutingBiasCallback(TrainerCallback):
    """Counts the tokens of each expert over the micro-batches of a step, and updates the routing bias after it."""

    def __init__(self, rate: float):
        self._rate = rate
        self._counts: Any = None  # (L,E), of the step so far
        self._last: Any = None  # (L,E), of the step before

    def add(self, router_experts: Sequence[Tensor], n_experts: int) -> None:
        """Count what the routers chose for one micro-batch: L times (B,T,k)."""
        counts = tokens_per_expert(router_experts, n_experts)
        self._counts = counts if self._counts is None else self._counts + counts

    def load(self) -> float:
        """Tokens of the fullest expert over the mean, in the worst layer of the last step; 1 is even."""
        counts = self._last.cpu().double()  # MPS has no float64
        return float((counts.amax(dim=-1) / counts.mean(dim=-1)).max())

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: CustomLLM, **kwargs
    ) -> None:
        update_routing_bias(model, self._counts, self._rate)
        self._last, self._counts = self._counts, None


class MPSCallback(TrainerCallback):
    """Frees the memory that Apple's MPS keeps for nothing, and adds to each training line how much is in use.

    MPS keeps the buffers of every shape it has seen, and training, evaluation and the machine share one memory. On
    other devices it does nothing.
    """

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs
    ) -> None:
        if args.device.type == "mps" and "loss" in logs:
            torch.mps.empty_cache()
            logs["mps_allocated_gib"] = round(torch.mps.current_allocated_memory() / GIB, 3)
            logs["mps_driver_gib"] = round(torch.mps.driver_allocated_memory() / GIB, 3)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if args.device.type == "mps":
            torch.mps.empty_cache()


class LogCallback(TrainerCallback):
    """Writes the Trainer's three kinds of lines as train.py does: same columns, same files; then the run's verdict."""

    def __init__(
        self,
        config: RunConfig,
        log: RunLog,
        batches: MicroBatches,
        routing: RoutingBiasCallback,
        held_out: np.ndarray,
        peak_tflops: float,
    ):
        self._config, self._log, self._batches, self._routing = config, log, batches, routing
        self._held_out, self._peak_tflops = held_out, peak_tflops
        self._eval_loss = math.nan
        self._logged_step = self._first_step = 0
        self._meter: Any = None  # a Meter, from the first step on

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._first_step = self._logged_step = state.global_step
        self._meter = Meter(self._config, self._peak_tflops, lambda: self._batches.waited)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._log.bar.update()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs
    ) -> None:
        if "loss" in logs:
            self._log.write(self._training_line(logs, state.global_step))
        elif "eval_loss" in logs:
            self._log.write(self._evaluation_line(logs, state.global_step))
        elif "train_runtime" in logs:
            self._log.write(self._end_line(logs, state.global_step))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._log.close()  # the bar must not stand among what is printed next
        conclude(self._config, self._held_out, self._eval_loss, self._batches.skipped_rows)

    def _training_line(self, logs: dict, step: int) -> dict:
        record = step_record(
            loss=logs["loss"],
            grad_norm=logs["grad_norm"],
            learning_rate=logs["learning_rate"],
            epoch=self._epoch(step),
            step=step,
            expert_load=self._routing.load(),
            speed=self._meter.lap(step - self._logged_step),
            memory=peak_memory(),
        )
        self._logged_step = step
        return record | {name: value for name, value in logs.items() if name.startswith("mps_")}

    def _evaluation_line(self, logs: dict, step: int) -> dict:
        self._eval_loss = logs["eval_loss"]
        self._meter.exclude(logs["eval_runtime"])
        samples = len(self._held_out)
        batches = math.ceil(samples / self._config.data.batch_size)
        return eval_record(self._eval_loss, logs["eval_runtime"], samples, batches, self._epoch(step), step)

    def _end_line(self, logs: dict, step: int) -> dict:
        steps_done = step - self._first_step
        seconds, speed = self._meter.whole(steps_done)
        return end_record(
            self._config,
            seconds=seconds,
            steps_done=steps_done,
            loss=logs["train_loss"],
            epoch=self._epoch(step),
            nonfinite_steps=None,
            speed=speed,
            memory=peak_memory(),
            peak_tflops=self._peak_tflops,
            compile_seconds=None,
        )

    def _epoch(self, step: int) -> float:
        """Passes over the data; the Trainer counts from the start of the process instead."""
        progress = self._batches.progress
        return step / self._config.schedule.steps if progress is None else progress


class TextGenerationCallback(TrainerCallback):
    """At the end, continues the config's prompts on the cache and writes `samples.md`."""

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase):
        self._config, self._tokenizer = config, tokenizer

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: CustomLLM, **kwargs
    ) -> None:
        self.write(model)

    def write(self, model: CustomLLM) -> None:
        config = self._config
        new_tokens = functools.partial(
            generate,
            model,
            temperature=config.sampling.temperature,
            top_p=config.sampling.top_p,
            seed=config.seed,
            eos_token_id=config.model.eos_token_id,
        )
        write_samples(config, self._tokenizer, new_tokens)
