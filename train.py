"""Train a CustomLLM. With no arguments: preset `tiny` on the standard library's source code, in minutes on a CPU.

python train.py                                         # train, or resume the last run
python train.py --preset customllm-1b --recipe seed     # the source's run
python train.py --help                                  # every option
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import tyro
from flax import nnx

from jaxllm.checkpoint import Checkpoints, is_run
from jaxllm.config import SPECIAL_TOKENS, TrainConfig, changed_fields, read_json, recipe, write_json
from jaxllm.data.corpus import open_source
from jaxllm.data.stream import Prefetcher, TokenStream, held_out_rows
from jaxllm.data.tokenizer import align, encode_prompt, load_tokenizer, train_tokenizer
from jaxllm.errors import UserError, exit_on_user_error
from jaxllm.generate import Sampling, generate
from jaxllm.loss import IGNORED
from jaxllm.metrics import RunLog, draw_losses, rounded, unigram_loss
from jaxllm.model.decoder import CustomLLM
from jaxllm.model.summary import module_tree
from jaxllm.step import TrainState, count_parameters, eval_step, init_state, model_graph, train_step


def parse_args(argv: Sequence[str] | None) -> TrainConfig:
    """The recipe and the preset give the defaults; every other option overrides one value."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="tiny")
    first.add_argument("--recipe", default="default")
    chosen, _ = first.parse_known_args(argv)
    default = recipe(chosen.recipe, chosen.preset)
    return tyro.cli(TrainConfig, args=argv, default=default, prog="train.py", description=__doc__)


def check_folder(config: TrainConfig) -> bool:
    """Whether the run's folder holds a run to go on with; nothing is touched.

    Raises:
        UserError: the folder is something else.
    """
    folder = config.folder
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise UserError(f"run_dir is {str(folder)!r}: that is a file")
    ours = (folder / "train_config.json").is_file() or is_run(folder)
    if not ours and any(folder.iterdir()):
        raise UserError(f"run_dir is {str(folder)!r}: the folder holds something else; pass another --run-dir")
    return ours and not config.overwrite


def check_resumable(config: TrainConfig) -> None:
    """Compare with the config that the run's folder holds.

    Raises:
        UserError: a field that decides the numbers has changed.
    """
    if (config.folder / "train_config.json").is_file():
        saved = read_json(config.folder / "train_config.json")
    else:  # made by the converter: weights without a training history
        model = read_json(config.folder / "config.json")
        unset = {name for name in SPECIAL_TOKENS if model.get(name) is None}
        model |= {name: getattr(config.model, name) for name in unset}  # a raw state_dict names no special tokens
        saved = config.to_dict() | {"model": model}
    if changed := changed_fields(saved, config):
        name, before, now = changed[0]
        raise UserError(
            f"{name} is {now!r}, but the run in {config.folder} has {before!r}: "
            "pass the old value, --overwrite to start anew, or another --run-dir"
        )


def prepare(config: TrainConfig):
    """Everything that can be refused is refused here, before anything is built or deleted.

    Returns:
        The config aligned with the tokenizer, the tokenizer, the held-out rows, and whether the run resumes.
    """
    resumes = check_folder(config)
    source = open_source(config)
    if resumes and (config.folder / "tokenizer").is_dir():
        tokenizer = load_tokenizer(str(config.folder / "tokenizer"))
    elif config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        print(f"Training a tokenizer of {config.model.vocab_size} tokens on {config.data} ...")
        tokenizer = train_tokenizer(source, config.model.vocab_size)
    config = align(config, tokenizer)
    if resumes:
        check_resumable(config)
    longest = max((len(encode_prompt(tokenizer, prompt)) for prompt in config.prompts), default=0)
    if config.sample_tokens and longest >= config.model.max_position_embeddings:
        raise UserError(
            f"prompts has one of {longest} tokens: the position table of {config.model.max_position_embeddings} rows "
            "leaves no room behind it; pass shorter --prompts or --sample-tokens 0"
        )
    held_out = held_out_rows(config, tokenizer)
    if not resumes:
        if config.folder.exists():
            shutil.rmtree(config.folder)
        config.folder.mkdir(parents=True)
    if not (config.folder / "tokenizer").is_dir():
        tokenizer.save_pretrained(str(config.folder / "tokenizer"))
    write_json(config.folder / "config.json", config.model.to_dict())
    write_json(config.folder / "train_config.json", config.to_dict())
    return config, tokenizer, held_out, resumes


class Evaluator:
    """Mean cross-entropy over the held-out rows."""

    def __init__(self, config: TrainConfig, graph: nnx.GraphDef, rows: np.ndarray):
        short = -len(rows) % config.batch_size
        padded = np.concatenate([rows, np.full((short, rows.shape[1]), IGNORED, np.int32)])
        self._batches = padded.reshape(-1, config.batch_size, rows.shape[1])
        self._samples = len(rows)
        self._step = jax.jit(functools.partial(eval_step, graph))

    def __call__(self, state: TrainState) -> dict[str, float]:
        start = time.perf_counter()
        sums = [self._step(state.params, state.routing_bias, batch) for batch in self._batches]
        loss = sum(float(nll) for nll, _ in sums) / sum(int(count) for _, count in sums)
        seconds = time.perf_counter() - start
        return {
            "eval_loss": loss,
            "eval_runtime": rounded(seconds),
            "eval_samples_per_second": rounded(self._samples / seconds, 3),
            "eval_steps_per_second": rounded(len(self._batches) / seconds, 3),
        }


def write_samples(config: TrainConfig, tokenizer, model: CustomLLM) -> None:
    """Continue the config's prompts, print them, and keep them in `samples.md`."""
    prompts = [encode_prompt(tokenizer, prompt) for prompt in config.prompts]
    room = config.model.max_position_embeddings - max(len(prompt) for prompt in prompts)
    new = generate(
        model,
        prompts,
        min(config.sample_tokens, room),
        Sampling(temperature=config.temperature, top_p=config.top_p),
        seed=config.seed,
        eos_token_id=config.model.eos_token_id,
    )
    sections = []
    for prompt, tokens in zip(config.prompts, new, strict=True):
        text = prompt + tokenizer.decode(tokens)
        print(f"\nPrompt: {prompt}\nGenerated Text: {text}")
        fence = "`" * 4
        sections.append(f"## {prompt.strip()!r}\n\n{fence}\n{text}\n{fence}\n")
    (config.folder / "samples.md").write_text("\n".join(sections), encoding="utf-8")


def train(config: TrainConfig, tokenizer, held_out: np.ndarray, resumes: bool) -> TrainState:
    """The training loop: from the last checkpoint, or from scratch, to `config.steps`."""
    graph = model_graph(config)
    checkpoints = Checkpoints(config.folder, config.keep_checkpoints)
    stream = TokenStream(open_source(config), tokenizer, config.seq_len, config.seed)
    if resumes and checkpoints.latest() is not None:
        state, position = checkpoints.restore(config)
        if position is not None:
            stream.seek(position)
        print(f"Resuming from step {int(state.step)} of {config.folder}")
    else:
        state = jax.jit(functools.partial(init_state, config))()
    print(f"Model parameters: {count_parameters(state.params) / 1e6:.2f}M")
    print(module_tree(config.model))
    print(
        f"Training for {config.steps} steps of {config.tokens_per_step} tokens in {config.precision} on "
        f"{jax.devices()[0].device_kind} ({jax.default_backend()}); everything goes to {config.folder}"
    )

    first_step = int(state.step)
    if first_step >= config.steps:
        print(f"The run has its {first_step} steps: pass --steps MORE to go on, or --overwrite to start anew.")
        checkpoints.close()
        return state
    step_fn = jax.jit(functools.partial(train_step, config, graph), donate_argnums=0)
    evaluate = Evaluator(config, graph, held_out)
    log = RunLog(config.folder, first_step, config.steps)
    rows_per_step = config.grad_accum * config.batch_size
    batches = Prefetcher(stream, rows_per_step)
    unlogged, all_losses = [], []
    epoch = 0.0
    started = logged = time.perf_counter()
    try:
        for step in range(first_step + 1, config.steps + 1):
            batch = next(batches)
            labels = batch.rows.reshape(config.grad_accum, config.batch_size, config.seq_len)
            state, metrics = step_fn(state, labels)
            unlogged.append(metrics.loss)
            if len(unlogged) > 1:
                unlogged[-2].block_until_ready()  # one step ahead of the device, so that the bar tells the truth
            epoch = step / config.steps if batch.progress is None else batch.progress
            last = step == config.steps
            log.bar.update()

            if step % config.log_every == 0 or last:
                losses = [float(loss) for loss in jax.device_get(unlogged)]  # waits for the device
                now = time.perf_counter()
                tokens = len(losses) * config.tokens_per_step
                log.write(
                    {
                        "loss": rounded(float(np.mean(losses))),
                        "grad_norm": float(metrics.grad_norm),
                        "learning_rate": float(metrics.learning_rate),
                        "epoch": rounded(epoch, 2),
                        "step": step,
                        "tokens_per_second": rounded(tokens / (now - logged), 1),
                        "expert_load": rounded(float(metrics.expert_load), 3),
                    }
                )
                all_losses += losses
                unlogged, logged = [], now
            if step % config.eval_every == 0 or last:
                evaluation = evaluate(state)
                log.write(evaluation | {"epoch": rounded(epoch, 2), "step": step})
                logged = time.perf_counter()
            if step % config.save_every == 0 or last:
                checkpoints.save(state, batch.position)
        checkpoints.wait()
        seconds, steps_done = time.perf_counter() - started, config.steps - first_step
        log.write(
            {
                "train_runtime": rounded(seconds),
                "train_samples_per_second": rounded(steps_done * rows_per_step / seconds, 3),
                "train_steps_per_second": rounded(steps_done / seconds, 3),
                "train_tokens_per_second": rounded(steps_done * config.tokens_per_step / seconds, 1),
                "train_loss": float(np.mean(all_losses)),
                "epoch": rounded(epoch, 2),
                "step": config.steps,
            }
        )
    finally:
        batches.close()
        log.close()
        checkpoints.close()  # an interrupted run keeps the checkpoint that is being written
    if stream.skipped_rows:
        print(f"{stream.skipped_rows} rows of the data held no text and were skipped")
    unigram = unigram_loss(held_out)
    final = evaluation["eval_loss"]
    print(f"Evaluation loss {final:.4f} nats per token; the best possible unigram model has {unigram:.4f}")
    draw_losses(config.folder, unigram)
    return state


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    config, tokenizer, held_out, resumes = prepare(parse_args(argv))
    state = train(config, tokenizer, held_out, resumes)
    if config.sample_tokens and config.prompts:
        write_samples(config, tokenizer, nnx.merge(model_graph(config), state.params, state.routing_bias))
    print(f"\nEverything is in {Path(config.folder)}")


if __name__ == "__main__":
    sys.exit(main())
