"""What a run reports while it trains: console lines, metrics.jsonl, TensorBoard events, and other trackers."""

import contextlib
import math
from datetime import timedelta
from typing import Any, Self

from tqdm import tqdm

from jaxllm.config import RunConfig
from jaxllm.model import flops
from jaxllm.run.tensorboard import TensorBoardWriter
from jaxllm.run.throughput import Speed, Totals
from jaxllm.run.trackers import Tracker
from jaxllm.store.folder import METRICS_FILE
from jaxllm.store.history import History
from jaxllm.store.metrics_file import json_line, write_metrics


class RunLog:
    """Writes each record to the console (around the progress bar), to `metrics.jsonl` and to the trackers.

    The bar is shown only where stderr is a terminal.
    """

    def __init__(self, config: RunConfig, history: History, first_step: int):
        """`metrics.jsonl` is rewritten from the history: what an earlier process logged beyond it is dropped."""
        self._config, self._history = config, history
        self._path = config.folder / METRICS_FILE
        write_metrics(config.folder, history.records)
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        self._board = TensorBoardWriter(config.folder / "tensorboard", first_step)
        self._tracker = Tracker(config.logging.log_to, config.folder, config.options())
        self.bar = tqdm(total=config.schedule.steps, initial=first_step, unit="step", dynamic_ncols=True, disable=None)

    def write(self, record: dict[str, Any]) -> None:
        """Log one record, which has a `step`. Raises an OSError if it cannot be written to the disk."""
        self._history.add_record(record)
        config, as_text = self._config, self._config.logging.log_format == "text"
        tqdm.write(console_line(record, config.schedule.steps, config.tokens_per_step) if as_text else str(record))
        try:
            self._file.write(json_line(record))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        self._board.write(record)
        self._tracker.write(record)

    def close(self, *, failed: bool = False) -> None:
        """Close everything; `failed`: an error ends the run. A second call does nothing."""
        self.bar.close()
        self._file.close()
        self._board.close()
        self._tracker.close(failed=failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():
            self.close(failed=error is not None)


class NoLog(RunLog):
    """The log of a process that is not the primary one: it only keeps the history."""

    def __init__(self, history: History):
        self._history = history
        self.bar = tqdm(disable=True)

    def write(self, record: dict[str, Any]) -> None:
        self._history.add_record(record)

    def close(self, *, failed: bool = False) -> None:
        pass


def console_line(record: dict[str, Any], last: int, tokens_per_step: int) -> str:
    """A record as a line of text; the training lines of a run of `last` steps are aligned."""
    where = f"step {record['step']:>{len(str(last))}}/{last}"
    if "loss" in record:
        rate = record["tokens_per_second"]
        seconds = (last - record["step"]) * tokens_per_step / rate if rate else 0
        left = str(timedelta(seconds=round(seconds)))
        return (
            f"{where}  loss {record['loss']:8.4f}  lr {record['learning_rate']:.2e}  {rate:10,.0f} tokens/s  "
            f"expert load {record['expert_load']:5.2f}  left {left:>8}"
        )
    if "eval_loss" in record:
        on = f" on {record['eval_targets']:,} targets" if "eval_targets" in record else ""
        return (
            f"{where}  evaluation loss {record['eval_loss']:.4f}{on}, {record['eval_bits_per_byte']:.4f} bits per "
            f"byte, in {record['eval_runtime']:.1f} s"
        )
    if "loss_spike" in record:
        return f"{where}  loss {record['loss_spike']} is far above the usual {record['usual_loss']}"
    if "nonfinite_loss" in record:
        return (
            f"{where}  loss {record['nonfinite_loss']}, gradient norm {record['nonfinite_grad_norm']}: not finite, so "
            "the step changed nothing"
        )
    return (
        f"{where}  the run took {timedelta(seconds=round(record['train_runtime']))}; mean loss "
        f"{record['train_loss']:.4f}, {record['train_tokens_per_second']:,.0f} tokens/s, at most "
        f"{record['host_peak_gib']:.1f} GiB of memory"
    )


def nonfinite_record(loss: float, grad_norm: float, step: int, position: dict[str, Any]) -> dict[str, Any]:
    """A step that changed nothing, because its loss or its gradient was not finite; `position`: before its batch."""
    return {"nonfinite_loss": str(loss), "nonfinite_grad_norm": str(grad_norm), "position": position, "step": step}


def spike_record(loss: float, usual: float, step: int) -> dict[str, Any]:
    """A step whose loss is far above the running mean."""
    return {"loss_spike": rounded(loss), "usual_loss": rounded(usual), "step": step}


def step_record(
    step: int,
    epoch: float,
    *,
    loss: float,
    grad_norm: float,
    learning_rate: float,
    expert_load: float,
    speed: Speed,
    memory: dict[str, float],
) -> dict[str, Any]:
    """The training line: the source's columns, then the load of the fullest expert, speed and memory."""
    return {
        "loss": rounded(loss),
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "epoch": rounded(epoch, 2),
        "step": step,
        "tokens_per_second": rounded(speed.tokens_per_second, 1),
        "expert_load": rounded(expert_load, 3),
        **_speed_columns(speed),
        **_memory_columns(memory),
    }


def _speed_columns(speed: Speed, prefix: str = "") -> dict[str, float]:
    shares = {name: significant(getattr(speed, name)) for name in ("tflops_per_second", "mfu_full", "mfu_causal")}
    return {prefix + name: value for name, value in (shares | {"data_wait": rounded(speed.data_wait)}).items()}


def _memory_columns(memory: dict[str, float]) -> dict[str, float]:
    return {name: rounded(value, 3) for name, value in memory.items()}


def bits_per_byte(loss: float, bytes_per_target: float) -> float:
    """A loss in nats per token, independent of the tokenizer; NaN if no token is text."""
    return loss / bytes_per_target / math.log(2) if bytes_per_target else math.nan


def eval_record(
    loss: float,
    bytes_per_target: float,
    *,
    seconds: float,
    samples: int,
    batches: int,
    epoch: float,
    step: int,
    targets: int | None = None,
) -> dict[str, Any]:
    """The evaluation line; `loss` in nats per target. `targets`: how many there are, where not all tokens are."""
    counted = {} if targets is None else {"eval_targets": targets}
    return {
        "eval_loss": loss,
        **counted,
        "eval_bits_per_byte": rounded(bits_per_byte(loss, bytes_per_target)),
        "eval_runtime": rounded(seconds),
        "eval_samples_per_second": rounded(samples / seconds, 3),
        "eval_steps_per_second": rounded(batches / seconds, 3),
        "epoch": rounded(epoch, 2),
        "step": step,
    }


def end_record(
    config: RunConfig,
    epoch: float,
    *,
    totals: Totals,
    loss: float,
    memory: dict[str, float],
    peak_tflops: float,
    nonfinite_steps: int | None = None,
    compile_seconds: float | None = None,
) -> dict[str, Any]:
    """The last line of a run.

    Args:
        config: of the run.
        epoch: passes over the data.
        totals: time and speed of this process's steps.
        loss: mean of the run's steps.
        memory: the columns of peak memory.
        peak_tflops: the reference of the MFU.
        nonfinite_steps: steps of the run that changed nothing; None if they are not counted.
        compile_seconds: before the first step; None if nothing is compiled.
    """
    steps_done, seconds, speed = totals
    compiled = {} if compile_seconds is None else {"compile_seconds": rounded(compile_seconds, 2)}
    counted = {} if nonfinite_steps is None else {"nonfinite_steps": nonfinite_steps}
    rows = steps_done * config.data.grad_accum * config.data.batch_size
    return {
        "train_runtime": rounded(seconds),
        "train_samples_per_second": rounded(rows / seconds, 3),
        "train_steps_per_second": rounded(steps_done / seconds, 3),
        "train_tokens_per_second": rounded(speed.tokens_per_second, 1),
        "train_loss": loss,
        "epoch": rounded(epoch, 2),
        "step": config.schedule.steps,
        **counted,
        **_speed_columns(speed, "train_"),
        **_memory_columns(memory),
        "peak_tflops": significant(peak_tflops),
        "parameters": sum(flops.parameters(config.model).values()),
        "active_parameters": sum(flops.active_parameters(config.model).values()),
        **compiled,
    }


def rounded(value: float, digits: int = 4) -> float:
    """A number for a log line; NaN and infinities are unchanged."""
    return round(value, digits) if math.isfinite(value) else value


def significant(value: float) -> float:
    """A number of any size for a log line, to four significant digits."""
    return float(f"{value:.4g}")
