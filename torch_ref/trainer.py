"""transformers' Trainer with the data, loss, schedule and checkpoints of this project."""

import functools
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from jaxllm.config import PrecisionOption, RunConfig
from jaxllm.data.stream import POSITION_FILE
from jaxllm.data.tokenizer import export_tokenizer
from jaxllm.errors import UserError
from jaxllm.run.prepare import Prepared
from torch_ref.batches import MicroBatches, as_inputs
from torch_ref.callbacks import MPSCallback, RoutingBiasCallback, ScheduleCallback
from torch_ref.checkpoint import reading
from torch_ref.model import CustomLLM
from torch_ref.step import auxiliary_loss, make_optimizer, make_schedule


def choose_device(precision: PrecisionOption) -> torch.device:
    """The device that accelerate chooses: CUDA before MPS before CPU.

    Raises:
        UserError: it cannot compute in this precision, or several processes were started.
    """
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(f"WORLD_SIZE is {processes}: the PyTorch path trains in one process; start it without torchrun")
    device: Any = PartialState().device
    if precision == "bfloat16" and device.type != "cpu" and not is_torch_bf16_gpu_available():
        raise UserError(f"precision is 'bfloat16': the device {device} does not support it; pass --precision float32")
    return device


def training_arguments(config: RunConfig) -> TrainingArguments:
    """Translate the config. `ScheduleCallback` decides when to log, evaluate and save."""
    args = TrainingArguments(
        output_dir=str(config.folder),
        max_steps=config.schedule.steps,
        per_device_train_batch_size=config.data.batch_size,
        per_device_eval_batch_size=config.data.batch_size,
        gradient_accumulation_steps=config.data.grad_accum,
        activation_checkpointing=config.remat,
        max_grad_norm=config.optim.max_grad_norm,
        bf16=config.precision == "bfloat16",
        use_cpu=choose_device(config.precision).type == "cpu",
        seed=config.seed % 2**32,  # NumPy's limit
        logging_strategy="no",
        save_strategy="no",
        save_total_limit=config.checkpoint.keep_checkpoints,
        ignore_data_skip=True,  # the stream seeks to its position
        logging_nan_inf_filter=False,  # show a loss that is not finite
        use_cache=True,  # False would turn the cache off in the saved config.json
        dataloader_pin_memory=False,
        disable_tqdm=True,
        log_level="error",
        report_to="none",
    )
    args.mixed_precision = "bf16" if args.bf16 else "no"  # the config decides, not an environment variable
    if args.device.type == "cuda":
        args._n_gpu = 1  # with several GPUs the Trainer would wrap the model in DataParallel and enlarge the batch
    return args


class CustomLLMTrainer(Trainer):
    """A Trainer that computes train.py's numbers: same batches, same loss, same update, same routing bias.

    The model is trained in place on `batches` and evaluated on `prepared.held_out`.
    """

    def __init__(self, prepared: Prepared[RunConfig], model: CustomLLM, batches: MicroBatches):
        config = prepared.config
        self._config, self._tokenizer, self._batches = config, prepared.tokenizer, batches
        self._held_out = [as_inputs(row, config.data) for row in prepared.held_out]
        self._eval_targets = prepared.eval_targets
        self._cross_entropy: Any = None  # (), the last micro-batch's share of the mean
        self.routing = RoutingBiasCallback(config.optim.bias_update_rate)
        optimizer = make_optimizer(model, config.optim, config.decided_precision)
        self._schedule = functools.partial(make_schedule, schedule=config.schedule, peak=config.optim.learning_rate)
        schedule = ScheduleCallback(config.schedule.steps, config.logging, config.checkpoint.save_every)
        super().__init__(
            model,
            training_arguments(config),
            eval_dataset=self._held_out,  # pyright: ignore[reportArgumentType]
            callbacks=[schedule, self.routing, MPSCallback()],
            optimizers=(optimizer, self._schedule(optimizer)),
        )
        self.remove_callback(PrinterCallback)  # `LogCallback` writes the log

    def get_train_dataloader(self) -> MicroBatches:
        return self._batches

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This micro-batch's share of the step's loss: its summed cross-entropy over all targets of the step.

        Only the model shifts the labels. The experts are counted from the output of the forward pass, so that a layer
        recomputed in the backward pass does not count twice.
        """
        config, labels = self._config, inputs["labels"]
        if self._eval_targets and not model.training:  # the Trainer takes the mean over rows, which have other counts
            num_items_in_batch = self._eval_targets * len(labels) / len(self._held_out)
        output = model(
            inputs["input_ids"], labels=labels, num_items_in_batch=num_items_in_batch, output_router=model.training
        )
        loss = output.loss
        if model.training:
            self._cross_entropy = loss.detach()
            self.routing.add(output.router_experts, config.model.n_routed_experts)
            loss = loss + auxiliary_loss(output, config.optim) / config.data.grad_accum
        return (loss, output) if return_outputs else loss

    def training_step(self, *args, **kwargs) -> Tensor:
        super().training_step(*args, **kwargs)
        return self._cross_entropy  # the logged loss excludes the auxiliary losses

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # unused; counting them would loop over all modules for each micro-batch

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed, which would change dropout
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        if "learning_rate" in logs:  # that of the next update, as in the source's log; the Trainer gives the last one
            logs["learning_rate"] = self.lr_scheduler.get_last_lr()[0]
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, the tokenizer and the data position, but not `training_args.bin`, an unused pickle.

        The Trainer then adds its own files.
        """
        folder, batch, model = Path(output_dir or str(self.args.output_dir)), self._batches.batch, self.model
        assert batch is not None  # nothing is saved before the first batch
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)  # pyright: ignore
        export_tokenizer(self._tokenizer, self._config.model, folder)
        (folder / POSITION_FILE).write_bytes(batch.position.to_bytes())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        with reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if names := [*load_result.missing_keys, *load_result.unexpected_keys]:
            raise ValueError(f"its weights are not those of this model: {names[0]} and {len(names) - 1} more")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint or ""):
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return  # no checkpoint: a new run
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        # the saved schedule belongs to the number of steps at that time
        optimizer: Any = self.optimizer
        self.lr_scheduler = self._schedule(optimizer.optimizer, steps_done=self.state.global_step)
