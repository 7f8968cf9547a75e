"""What a run prints besides its log, at its start and end: its size and speed, its result and samples.

Imports neither JAX nor PyTorch.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxllm.config import LoraConfig, RunConfig
from jaxllm.data.folder import described
from jaxllm.data.report import counted
from jaxllm.data.tokenizer import decode_after, encode_prompt
from jaxllm.errors import optional
from jaxllm.files import StrPath, read_json
from jaxllm.model import flops
from jaxllm.model.batch import IGNORED, token_batch
from jaxllm.run.metrics import bits_per_byte
from jaxllm.run.throughput import Peak, TokenFlops
from jaxllm.store.folder import DATA_REPORT
from jaxllm.store.metrics_file import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

    from jaxllm.run.prepare import Prepared


def announce(config: RunConfig, parameters: int, tree: str | None, device: str, bfloat16: str | None) -> None:
    """Print the model's size and, at the first start, its tree; and what is trained where.

    `bfloat16` is what multiplies bfloat16 in hardware on that device; None: nothing known.
    """
    model = config.model
    active = sum(flops.active_parameters(model).values())
    print(f"Model parameters: {parameters / 1e6:.2f}M")
    print(
        f"Active parameters: {active / 1e6:.2f}M (of the {model.n_routed_experts} routed experts the "
        f"{model.num_experts_per_tok} that a token uses; embeddings count whole)"
    )
    if tree is not None:
        print(tree)
    steps, warmup = config.schedule.steps, config.schedule.warmup_steps
    if warmup >= steps:
        print(
            f"The warm-up of {warmup} steps is not shorter than the run of {steps}: the learning rate never reaches "
            f"{config.optim.learning_rate:g}; pass a smaller --warmup-steps or more --steps"
        )
    has = f"{bfloat16} multiplies bfloat16 in hardware" if bfloat16 else "no known hardware support for bfloat16"
    if bfloat16 and config.precision == "bfloat16":
        has = f"--precision float32 is slower: {has}"
    elif bfloat16:
        has = f"a new run in --precision bfloat16 is faster: {has}"
    print(
        f"Training for {config.schedule.steps} steps of {config.tokens_per_step} tokens in {config.precision} ({has}) "
        f"on {device}; everything goes to {config.folder}"
    )


def announce_speed(token_flops: TokenFlops, peak: Peak, compile_seconds: float | None) -> None:
    """Print the reference of the log's speed columns."""
    full, causal = (flops / 1e6 for flops in token_flops)
    if compile_seconds is not None:
        print(f"Compiled in {compile_seconds:.1f} s")
    print(
        f"Model FLOPs of a training token: {full:.4g}M with attention counted full (T x T), {causal:.4g}M with its "
        f"causal half; MFU is their share of {peak.tflops:.4g} TFLOP/s ({peak.source} matrix products)"
    )


def announce_adapters(lora: LoraConfig, learning_rate: float, warmup_steps: int, trained: int) -> None:
    """Print what is trained in place of the model's weights, and at which rate: the default is not that of weights."""
    alpha = f"alpha {lora.resolved_alpha:g}{' (rsLoRA)' if lora.rslora else ''}"
    print(
        f"LoRA: rank {lora.rank}, {alpha}, on {lora.targets}: {trained:,} parameters are trained, with "
        f"--learning-rate {learning_rate:g} and --warmup-steps {warmup_steps}; all weights of the model are frozen, "
        f"its matrices in {lora.base_dtype}"
    )


def announce_finished(steps_done: int) -> None:
    print(f"The run has its {steps_done} steps: pass --steps MORE to continue, or --overwrite to start over.")


def unigram_loss(labels: np.ndarray) -> float:
    """Cross-entropy, in nats, of the best possible unigram model of labels (n,T): the entropy of the targets' counts.

    No model that ignores the context can do better on them, whatever it was trained on.
    """
    targets = labels[:, 1:]
    counts = np.bincount(targets[targets != IGNORED])
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def new_figure(**options: Any) -> Figure:
    """A matplotlib figure to save, without pyplot."""
    if "matplotlib" not in sys.modules and (backend := os.environ.pop("MPLBACKEND", None)):
        import matplotlib  # its import fails where MPLBACKEND names a backend that is not installed

        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    from matplotlib.figure import Figure

    return Figure(**options)


@optional("drawing loss.png")
def draw_losses(folder: StrPath, unigram: float, bytes_per_target: float) -> None:
    """Draw `loss.png`: training and evaluation loss, and the learning rate, over the steps."""
    records = read_metrics(folder)
    train = [record for record in records if record.get("loss") is not None]
    evaluated = [record for record in records if record.get("eval_loss") is not None]
    figure = new_figure(figsize=(8, 6))
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    figure.subplots_adjust(0.1, 0.09, 0.9, 0.97, hspace=0.12)
    losses.plot([r["step"] for r in train], [r["loss"] for r in train], label="training")
    if evaluated:
        losses.plot([r["step"] for r in evaluated], [r["eval_loss"] for r in evaluated], "o-", label="evaluation")
    losses.axhline(unigram, color="gray", linestyle=":", label="best unigram model")
    losses.set(ylabel="cross-entropy (nats per token)")
    losses.legend()
    if bytes_per_target:
        bits = bits_per_byte(1.0, bytes_per_target)  # of one nat per token
        axis = losses.secondary_yaxis("right", functions=(lambda nats: nats * bits, lambda value: value / bits))
        axis.set_ylabel("bits per byte")
    rates.plot([r["step"] for r in train], [r["learning_rate"] for r in train], color="tab:green")
    rates.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    rates.ticklabel_format(axis="y", scilimits=(0, 0))
    for axis in (losses, rates):
        axis.grid(alpha=0.3)
    figure.savefig(Path(folder, "loss.png"), dpi=100)


def conclude(prepared: Prepared[Any], eval_loss: float, skipped_rows: int, left_out: dict[str, str]) -> None:
    """Print the result of a run, and draw the picture of its losses.

    `skipped_rows` and `left_out` are the rows without text and the damaged files, with the reason.
    """
    if skipped_rows:
        print(f"Skipped {counted(skipped_rows, 'row')} without text or target")
    if left_out:
        print(f"{len(left_out)} damaged files of the data were left out: {'; '.join(described(left_out))}")
    config = prepared.config
    unigram = unigram_loss(token_batch(prepared.held_out, config.data).labels)
    bytes_each = prepared.bytes_per_target
    evaluation = (
        f"{eval_loss:.4f} nats per token, {bits_per_byte(eval_loss, bytes_each):.4f} bits per byte; the best possible "
        f"unigram model has {unigram:.4f} and {bits_per_byte(unigram, bytes_each):.4f} "
        f"(on {len(prepared.held_out)} rows)"
    )
    print(f"Evaluation loss {evaluation}")
    draw_losses(config.folder, unigram, bytes_each)
    write_report(config, evaluation, skipped_rows)


@optional("writing report.md")
def write_report(config: RunConfig, evaluation: str, skipped_rows: int) -> None:
    """Write `report.md`: what was trained on what, the result, the speed, and commands to continue with."""
    data = read_json(config.folder / DATA_REPORT)
    end = next(record for record in reversed(read_metrics(config.folder)) if "train_runtime" in record)
    steps, tokens = config.schedule.steps, config.tokens_per_step
    init, lora = config.options().get("init"), config.adapters
    origin = f"preset {config.preset}" if init is None else f"weights of {init}"
    origin += f", frozen, with adapters of rank {lora.rank} on {lora.targets}" if lora else ""
    device = f", {end['device_peak_gib']:.2f} GiB on the device" if "device_peak_gib" in end else ""
    skipped = f"skipped {counted(skipped_rows, 'row')} without text or target"
    rows = {
        "model": f"{origin}: {end['parameters']:,} parameters, {end['active_parameters']:,} active",
        "data": f"{config.data.source}: {end['epoch']} passes; {skipped}",
        "training": f"{steps:,} steps of {tokens:,} tokens ({steps * tokens:,}), in {config.precision}",
        "evaluation loss": evaluation,
        "mean training loss": f"{end['train_loss']:.4f}",
        "last start": f"{end['train_runtime']:,.0f} s, {end['train_tokens_per_second']:,.0f} tokens/s",
        "peak memory": f"{end['host_peak_gib']:.2f} GiB on the host{device}",
    }
    run = shlex.quote(str(config.folder))
    lines = [
        f"# {config.folder.name}\n\n| | |\n|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "\nData, as the last start found them:\n",
        *(f"- {line}" for line in [*data["lines"], *(f"not read: {line}" for line in data["not_read"])]),
        "\n![Losses](loss.png)\n\n[samples.md](samples.md) has samples, `metrics.jsonl` the log, `train_config.json` "
        "the options. To continue:\n\n```bash",
        f"python -m jaxllm.generate {run} --chat",
        f"python -m jaxllm.evaluate {run} --data FILE_OR_FOLDER",
        f"python -m convert to-torch {run} exported",
        f"python train.py --run-dir {run} --steps {2 * steps}",
        "```\n",
    ]
    (config.folder / "report.md").write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")


@optional("writing samples.md")
def write_samples(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, generate: Callable[[list[list[int]], int], list[list[int]]]
) -> None:
    """Continue the config's prompts, if it has any, print them, and write `samples.md`; a run on chats answers them.

    `generate` takes prompts as token ids and the number of tokens to add, and returns the new tokens of each.
    """
    if not (config.sampling.sample_tokens and config.sampling.prompts):
        return
    special = config.data.special_tokens_in_text
    as_chats = read_json(config.folder / DATA_REPORT)["encoded"]["chats"] > 0
    prompts = [encode_prompt(tokenizer, prompt, special, as_chats) for prompt in config.sampling.prompts]
    room = config.model.max_position_embeddings - max(len(prompt) for prompt in prompts)
    new = generate(prompts, min(config.sampling.sample_tokens, room))
    sections = []
    for prompt, ids, tokens in zip(config.sampling.prompts, prompts, new, strict=True):
        text = ("" if as_chats else prompt) + decode_after(tokenizer, ids, tokens)
        print(f"\nPrompt: {prompt}\nGenerated Text: {text}")
        fence = "`" * 4
        sections.append(f"## {prompt.strip()!r}\n\n{fence}\n{text}\n{fence}\n")
    (config.folder / "samples.md").write_text("\n".join(sections), encoding="utf-8")
