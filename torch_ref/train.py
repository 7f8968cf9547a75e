"""Train a CustomLLM in PyTorch with transformers' Trainer and accelerate, on CUDA, MPS or CPU.

python -m torch_ref.train                                         # train, or resume the last run
python -m torch_ref.train --preset customllm-1b --recipe seed     # the source's run
python -m torch_ref.train --help-all                              # every option: those of train.py
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxllm.config import RunConfig
from jaxllm.errors import UserError, exit_on_user_error
from jaxllm.packages import is_installed
from jaxllm.run.arguments import parse_args
from jaxllm.run.prepare import Prepared, prepare

PROGRAM = "python -m torch_ref.train"


@exit_on_user_error
def main_without_pytorch() -> None:
    parse_args(None, PROGRAM, __doc__, RunConfig)  # --help ends here
    raise UserError("PyTorch is not installed: pip install torch accelerate")


if __name__ == "__main__" and not is_installed("torch"):
    sys.exit(main_without_pytorch())  # before the imports that fail

import torch
from transformers.utils.logging import disable_progress_bar

from jaxllm.data.source import WHOLE
from jaxllm.data.stream import POSITION_FILE, open_stream, read_position
from jaxllm.run.metrics import RunLog
from jaxllm.run.reporting import announce, announce_finished, announce_speed
from jaxllm.run.throughput import TokenFlops, reference_peak
from jaxllm.store.history import History
from jaxllm.store.lock import FolderLock
from jaxllm.store.metrics_file import read_metrics
from torch_ref.batches import MicroBatches
from torch_ref.callbacks import LogCallback, TextGenerationCallback
from torch_ref.checkpoint import last_checkpoint, reading
from torch_ref.device import bfloat16_hardware, measured_peak_tflops
from torch_ref.model import CustomLLM
from torch_ref.trainer import CustomLLMTrainer, choose_device


def train(prepared: Prepared[RunConfig], model: CustomLLM | None = None) -> CustomLLM:
    """Train from the last checkpoint, or from scratch, to `config.schedule.steps`; write the samples; return the model.

    Args:
        prepared: returned by `jaxllm.run.prepare`.
        model: weights to start from; None: random, from `config.seed`. A checkpoint takes precedence over both.

    Raises:
        UserError: the checkpoint cannot be read, or the data end.
    """
    config = prepared.config
    checkpoint = last_checkpoint(config.folder) if prepared.resumes else None
    if model is None:
        torch.manual_seed(config.seed % 2**32)
        model = CustomLLM(config.model)
    stream = open_stream(config.data, config.seed, WHOLE, prepared.tokenizer)
    first_step = 0
    if checkpoint is not None:
        first_step = checkpoint.step
        stream.seek(read_position(checkpoint.folder / POSITION_FILE, config.data.seq_len, config.model.vocab_size))
        print(f"Resuming from step {first_step} of {config.folder}")
    device = choose_device(config.precision)
    parameters, tree = sum(p.numel() for p in model.parameters()), None if first_step else str(model)
    announce(config, parameters, tree, str(device), bfloat16_hardware(device))

    samples = TextGenerationCallback(config, prepared.tokenizer)
    if checkpoint is not None and first_step >= config.schedule.steps:
        announce_finished(first_step)
        with reading(checkpoint.folder):
            model = CustomLLM.from_pretrained(checkpoint.folder)
            model.to(device)  # pyright: ignore[reportArgumentType]
        samples.write(model)
        return model
    # measured before other threads use the device
    # PyTorch multiplies float32 without TF32, of which a data sheet's figure is
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" and config.precision == "bfloat16" else None
    measure = functools.partial(measured_peak_tflops, device=device)
    peak = reference_peak(config.logging.peak_tflops, config.decided_precision, kind, measure)
    token_flops = TokenFlops.of(config.model, config.data.seq_len, frozen=False)
    announce_speed(token_flops, peak, compile_seconds=None)
    batches = MicroBatches(stream, config.data)
    trainer = CustomLLMTrainer(prepared, model, batches)
    history = History.from_records([record for record in read_metrics(config.folder) if record["step"] <= first_step])
    try:
        with RunLog(config, history, first_step) as run_log:
            trainer.add_callback(LogCallback(prepared, run_log, batches, trainer.routing, peak.tflops))
            trainer.add_callback(samples)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.folder))
    finally:
        batches.prefetcher.close()
    return model


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    config = parse_args(argv, PROGRAM, __doc__, RunConfig)
    disable_progress_bar()  # one for each written file: the run has its own bar
    device = choose_device(config.precision)  # an unsuitable one is refused before anything is created or deleted
    with FolderLock(config.folder) as lock:
        train(prepare(config, "PyTorch", lock, bfloat16=bfloat16_hardware(device)))
    print(f"\nEverything is in {Path(config.folder)}")


if __name__ == "__main__":
    sys.exit(main())
