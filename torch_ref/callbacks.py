"""The Trainer's callbacks: schedule of logging, evaluation and saving; routing bias; MPS memory; log; samples."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from jaxllm.config import RunConfig
from jaxllm.config.groups import LoggingConfig
from jaxllm.run.metrics import RunLog, end_record, eval_record, step_record
from jaxllm.run.prepare import Prepared
from jaxllm.run.reporting import conclude, write_samples
from jaxllm.run.throughput import GIB, Meter, TokenFlops
from torch_ref.batches import MicroBatches
from torch_ref.device import peak_memory
from torch_ref.generate import generate
from torch_ref.model import CustomLLM
from torch_ref.step import expert_load, tokens_per_expert, update_routing_bias


class ScheduleCallback(TrainerCallback):
    """Logs, evaluates and saves at the steps of train.py: at each interval, and at the last step."""

    def __init__(self, steps: int, logging: LoggingConfig, save_every: int):
        self._steps, self._logging, self._save_every = steps, logging, save_every

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        callbacks: Any = state.stateful_callbacks
        # The Trainer reads this key when it saves; the state of a converted run lacks it.
        callbacks.setdefault("TrainerControl", control.state())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        step = state.global_step
        last = step >= self._steps
        control.should_log = last or step % self._logging.log_every == 0
        control.should_evaluate = last or step % self._logging.eval_every == 0
        control.should_save = last or step % self._save_every == 0


class RoutingBiasCallback(TrainerCallback):
    """Counts the tokens of each expert over the micro-batches of a step, then updates the routing bias."""

    def __init__(self, rate: float):
        self._rate = rate
        self._counts: Any = 0  # (L,E), of the current step
        self._last: Any = None  # (L,E), of the last step

    def add(self, router_experts: Sequence[Tensor], n_experts: int) -> None:
        """Add the experts that the routers chose for one micro-batch: L times (B,T,k)."""
        self._counts = self._counts + tokens_per_expert(router_experts, n_experts)

    def load(self) -> float:
        """`expert_load` of the last step."""
        return expert_load(self._last)

    def on_optimizer_step(self, args, state, control, model: CustomLLM, **kwargs) -> None:
        update_routing_bias(model, self._counts, self._rate)
        self._last, self._counts = self._counts, 0


class MPSCallback(TrainerCallback):
    """On Apple's MPS, empties the buffer cache and adds the memory in use to each training line.

    MPS caches the buffers of every shape it has seen, and shares one memory with the rest of the machine.
    """

    def on_log(self, args, state, control, logs: dict[str, Any], **kwargs) -> None:
        if args.device.type == "mps" and "loss" in logs:
            torch.mps.empty_cache()
            logs["mps_allocated_gib"] = round(torch.mps.current_allocated_memory() / GIB, 3)
            logs["mps_driver_gib"] = round(torch.mps.driver_allocated_memory() / GIB, 3)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        if args.device.type == "mps":
            torch.mps.empty_cache()


class LogCallback(TrainerCallback):
    """Writes the Trainer's logs as records of train.py (same columns and files), then the result of the run."""

    def __init__(
        self,
        prepared: Prepared[RunConfig],
        log: RunLog,
        batches: MicroBatches,
        routing: RoutingBiasCallback,
        peak_tflops: float,
    ):
        self._config, self._prepared, self._log, self._batches = prepared.config, prepared, log, batches
        self._bytes_per_target = prepared.bytes_per_target
        self._routing, self._peak_tflops = routing, peak_tflops
        self._eval_loss = math.nan
        self._logged_step = self._first_step = 0
        self._meter: Any = None  # a Meter, once training begins

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._first_step = self._logged_step = state.global_step
        model, seq_len, tokens_per_step = self._config.model, self._config.data.seq_len, self._config.tokens_per_step
        flops = TokenFlops.of(model, seq_len, frozen=False)
        self._meter = Meter(tokens_per_step, flops, self._peak_tflops, lambda: self._batches.prefetcher.waited)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._log.bar.update()

    def on_log(self, args, state, control, logs: dict[str, Any], **kwargs) -> None:
        if "loss" in logs:
            self._log.write(self._training_record(logs, state.global_step))
        elif "eval_loss" in logs:
            self._log.write(self._evaluation_record(logs, state.global_step))
        elif "train_runtime" in logs:
            self._log.write(self._end_record(logs, state.global_step))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._log.close()  # so that the bar does not mix with the lines printed next
        stream = self._batches.stream
        conclude(self._prepared, self._eval_loss, stream.skipped_rows, stream.left_out)

    def _training_record(self, logs: dict, step: int) -> dict:
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

    def _evaluation_record(self, logs: dict, step: int) -> dict:
        self._eval_loss = logs["eval_loss"]
        self._meter.exclude(logs["eval_runtime"])
        samples = len(self._prepared.held_out)
        batches = math.ceil(samples / self._config.data.batch_size)
        return eval_record(
            self._eval_loss, self._bytes_per_target, seconds=logs["eval_runtime"], samples=samples, batches=batches,
            epoch=self._epoch(step), step=step, targets=self._prepared.eval_targets,
        )  # fmt: skip

    def _end_record(self, logs: dict, step: int) -> dict:
        return end_record(
            self._config,
            self._epoch(step),
            totals=self._meter.totals(step - self._first_step),
            loss=logs["train_loss"],
            memory=peak_memory(),
            peak_tflops=self._peak_tflops,
        )

    def _epoch(self, step: int) -> float:
        """Passes over the data since step 0; the Trainer would count from the start of the process."""
        batch = self._batches.batch
        return step / self._config.schedule.steps if batch is None or batch.progress is None else batch.progress


class TextGenerationCallback(TrainerCallback):
    """After training, continues the config's prompts and writes `samples.md`."""

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase):
        self._config, self._tokenizer = config, tokenizer

    def on_train_end(self, args, state, control, model: CustomLLM, **kwargs) -> None:
        self.write(model)

    def write(self, model: CustomLLM) -> None:
        config, sampling = self._config, self._config.sampling
        options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": config.seed}
        new_tokens = functools.partial(generate, model, **options, eos_token_id=config.model.eos_token_id)
        write_samples(config, self._tokenizer, new_tokens)
