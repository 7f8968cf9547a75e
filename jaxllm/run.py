"""What the two training commands share around their loops: `train.py` (JAX) and `python -m torch_ref.train` (PyTorch).

The command line, the run's folder, and what a run says and writes at its end. Imports neither JAX nor PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import tyro

from jaxllm import flops
from jaxllm.atomic import move_to_the_disk
from jaxllm.config import SPECIAL_TOKENS, TrainConfig, changed_fields, read_json, recipe, write_json
from jaxllm.data.corpus import open_source
from jaxllm.data.stream import check_streams, held_out_rows
from jaxllm.data.tokenizer import align, encode_prompt, load_tokenizer, train_or_recall_tokenizer
from jaxllm.errors import UserError
from jaxllm.lock import LOCK_FILE, FolderLock
from jaxllm.metrics import draw_losses, unigram_loss
from jaxllm.shown import listed, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Framework = Literal["JAX", "PyTorch"]

# How a run is handed over to each framework.
HAND_OVER = {"JAX": "python -m convert to-flax {run} OUT", "PyTorch": "python -m convert to-torch {run} OUT --training"}


class Prepared(NamedTuple):
    config: TrainConfig  # aligned with the tokenizer
    tokenizer: PreTrainedTokenizerBase
    held_out: np.ndarray  # (n,T) int32, the rows that are evaluated
    resumes: bool  # whether the folder holds a run to go on with


def parse_args(argv: Sequence[str] | None, prog: str, description: str | None) -> TrainConfig:
    """The recipe and the preset give the defaults; every other option overrides one value."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="tiny")
    first.add_argument("--recipe", default="default")
    chosen, _ = first.parse_known_args(argv)
    default = recipe(chosen.recipe, chosen.preset)
    return tyro.cli(TrainConfig, args=argv, default=default, prog=prog, description=description)


def checkpoint_owner(folder: Path) -> Framework | None:
    """Whose checkpoints a run's folder holds; None: it holds none yet."""
    if any(folder.glob("checkpoint-*/")):
        return "PyTorch"
    if any(folder.glob("checkpoints/*/")):
        return "JAX"
    return None


def check_folder(config: TrainConfig, framework: Framework) -> bool:
    """Whether the run's folder holds a run to go on with; nothing is touched.

    Raises:
        UserError: the folder is something else, or a run of the other framework.
    """
    folder = config.folder
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise UserError(f"run_dir is {str(folder)!r}: that is a file")
    owner = checkpoint_owner(folder)
    # Not `checkpoint-*`: any project's Trainer writes such folders, beside any project's config.json.
    made_by_converter = (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()
    ours = (folder / "train_config.json").is_file() or made_by_converter
    if not ours and not all(path.name.startswith((LOCK_FILE, ".train_config.json.")) for path in folder.iterdir()):
        raise UserError(f"run_dir is {str(folder)!r}: the folder holds something else; pass another --run-dir")
    if not ours or config.overwrite:
        return False
    if owner not in (None, framework):
        raise UserError(
            f"run_dir is {str(folder)!r}: it holds a {owner} run; hand it over with "
            f"`{HAND_OVER[framework].format(run=folder)}`, or pass another --run-dir"
        )
    return True


def check_resumable(config: TrainConfig) -> None:
    """Compare with the config that the run's folder holds.

    Raises:
        UserError: a field that decides the numbers has changed.
    """
    if (config.folder / "train_config.json").is_file():
        saved = read_json(config.folder / "train_config.json")
        saved |= {"data_streams": streams_of(saved)}
    else:  # made by the converter: weights without a training history
        model = read_json(config.folder / "config.json")
        unset = {name for name in SPECIAL_TOKENS if model.get(name) is None}
        model |= {name: getattr(config.model, name) for name in unset}  # a raw state_dict names no special tokens
        saved = config.to_dict() | {"model": model}
    if changed := changed_fields(saved, config):
        name, before, now = changed[0]
        raise UserError(
            f"{listed([name])} is {now!r}, but the run in {config.folder} has {shown(before)}: "
            "pass the old value, --overwrite to start anew, or another --run-dir"
        )


def streams_of(saved: dict) -> int:
    """Data streams of the run that a train_config.json belongs to; of those before there were several, one."""
    return saved.get("data_streams") or 1


def prepare(config: TrainConfig, framework: Framework, lock: FolderLock, processes: int = 1) -> Prepared:
    """Everything that can be refused is refused here, before anything is built or deleted.

    Args:
        config: as the user gave it.
        framework: that trains.
        lock: of the run's folder; it is taken here.
        processes: that share the run; a new run then has as many data streams, unless the config says otherwise.

    Raises:
        UserError: the folder, the data, the tokenizer or a prompt does not fit the config.
    """
    check_folder(config, framework)  # before anything is written there
    lock.take()
    resumes = check_folder(config, framework)
    if config.replay is not None and not resumes:
        raise UserError(f"replay is {config.replay}: {str(config.folder)!r} holds no run")
    file = config.folder / "train_config.json"
    saved = read_json(file) if resumes and file.is_file() else {}
    if config.data_streams is None:
        config = dataclasses.replace(config, data_streams=streams_of(saved) if saved else processes)
    if config.data_revision is None:
        config = dataclasses.replace(config, data_revision=saved.get("data_revision"))
    if config.replay is not None:  # the learning rate depends on it
        config = dataclasses.replace(config, steps=saved.get("steps", config.steps))
    source = open_source(config)
    if config.data_revision is None:
        config = dataclasses.replace(config, data_revision=source.position.get("revision"))
    if resumes and (config.folder / "tokenizer").is_dir():
        tokenizer = load_tokenizer(str(config.folder / "tokenizer"))
    elif config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        tokenizer = train_or_recall_tokenizer(source, config.model.vocab_size, config.data)
    config = align(config, tokenizer)
    if resumes:
        check_resumable(config)
    longest = max((len(encode_prompt(tokenizer, prompt)) for prompt in config.prompts), default=0)
    if config.sample_tokens and longest >= config.model.max_position_embeddings:
        raise UserError(
            f"prompts has one of {longest} tokens: the position table of {config.model.max_position_embeddings} rows "
            "leaves no room behind it; pass shorter --prompts or --sample-tokens 0"
        )
    check_streams(config)
    held_out = held_out_rows(config, tokenizer)
    if config.replay is not None:
        return Prepared(config, tokenizer, held_out, resumes)
    if not resumes:
        _clear(config.folder)
    # First what makes the folder ours: a process may be killed between any two lines.
    write_json(config.folder / "train_config.json", config.to_dict())
    write_json(config.folder / "config.json", config.model.to_dict())
    if not (config.folder / "tokenizer").is_dir():
        _save_tokenizer(tokenizer, config.folder / "tokenizer")
    return Prepared(config, tokenizer, held_out, resumes)


def _clear(folder: Path) -> None:
    """Delete what an earlier run left; last the file that says whose folder it is, for a process may be killed."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "train_config.json"):
        if path.name.startswith(LOCK_FILE):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Whole or not at all: what a killed process left half written would be read as the run's tokenizer."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tokenizer-") as scratch:
        made = Path(scratch) / folder.name
        try:
            tokenizer.save_pretrained(str(made))
        except Exception as error:  # tokenizers hands on what the system says in words
            if not (code := re.search(r"os error (\d+)", str(error))):
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from None
        move_to_the_disk(made, folder)


def announce(config: TrainConfig, parameters: int, tree: str, device: str) -> None:
    """What a run says first: the model's size and tree, and what will be done where."""
    model = config.model
    active = sum(flops.active_parameters(model).values())
    print(f"Model parameters: {parameters / 1e6:.2f}M")
    print(
        f"Active parameters: {active / 1e6:.2f}M (of the {model.n_routed_experts} routed experts the "
        f"{model.num_experts_per_tok} that a token uses; embeddings count whole)"
    )
    print(tree)
    print(
        f"Training for {config.steps} steps of {config.tokens_per_step} tokens in {config.precision} on {device}; "
        f"everything goes to {config.folder}"
    )


def announce_speed(config: TrainConfig, peak_tflops: float, compile_seconds: float | None) -> None:
    """What the log's speed columns are held against."""
    full, causal = (
        flops.training_flops_per_token(config.model, config.seq_len, attention) / 1e6
        for attention in ("full", "causal")
    )
    if compile_seconds is not None:
        print(f"Compiled in {compile_seconds:.1f} s")
    print(
        f"Model FLOPs of a training token: {full:.4g}M with attention counted full (T x T), {causal:.4g}M with its "
        f"causal half; MFU is their share of {peak_tflops:.4g} TFLOP/s "
        f"({'measured on' if config.peak_tflops is None else 'given for'} {config.precision} matrix products)"
    )


def announce_finished(steps_done: int) -> None:
    print(f"The run has its {steps_done} steps: pass --steps MORE to go on, or --overwrite to start anew.")


def conclude(config: TrainConfig, held_out: np.ndarray, eval_loss: float, skipped_rows: int) -> None:
    """What a run says of its result, and the picture of its losses."""
    if skipped_rows:
        print(f"{skipped_rows} rows of the data held no text and were skipped")
    unigram = unigram_loss(held_out)
    print(f"Evaluation loss {eval_loss:.4f} nats per token; the best possible unigram model has {unigram:.4f}")
    draw_losses(config.folder, unigram)


def write_samples(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    generate: Callable[[list[list[int]], int], list[list[int]]],
) -> None:
    """Continue the config's prompts, print them, and keep them in `samples.md`; nothing where it asks for none.

    Args:
        config: its `prompts`, `sample_tokens` and folder are used.
        tokenizer: of the run.
        generate: given prompts as token ids and the most tokens to add, returns the new tokens of each.
    """
    if not (config.sample_tokens and config.prompts):
        return
    prompts = [encode_prompt(tokenizer, prompt) for prompt in config.prompts]
    room = config.model.max_position_embeddings - max(len(prompt) for prompt in prompts)
    new = generate(prompts, min(config.sample_tokens, room))
    sections = []
    for prompt, tokens in zip(config.prompts, new, strict=True):
        text = prompt + tokenizer.decode(tokens)
        print(f"\nPrompt: {prompt}\nGenerated Text: {text}")
        fence = "`" * 4
        sections.append(f"## {prompt.strip()!r}\n\n{fence}\n{text}\n{fence}\n")
    (config.folder / "samples.md").write_text("\n".join(sections), encoding="utf-8")
