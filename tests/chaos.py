"""Kill a training run at random moments, also while it saves, and see that it ends as if nothing had happened.

python -m tests.chaos --kills 30                     # minutes
python -m tests.chaos --kills 30 --data jsonl --devices 4 --seed 7
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from tests.configs import NARROW_MODEL

ROOT = Path(__file__).parents[1]

NARROW = (
    *NARROW_MODEL, "--model.vocab-size", "400", "--model.dropout", "0.1", "--batch-size", "4",
    "--grad-accum", "2", "--eval-samples", "7", "--sample-tokens", "0", "--peak-tflops", "1",
    # neither divides the other: lines, evaluations and checkpoints fall apart
    "--log-every", "3", "--eval-every", "13", "--save-every", "5", "--keep-every", "20",
)  # fmt: skip


@dataclass
class Options:
    kills: int = 30
    """How often the run is killed."""
    steps: int = 150
    """Of the run: as many as take longer than a start."""
    data: Literal["stdlib", "text", "jsonl"] = "text"
    """The standard library's sources, a folder of text files, or one JSONL file."""
    devices: int = 1
    """Simulated CPU devices, along the axis fsdp."""
    seed: int = 0
    """Of the moments of the kills."""


def write_data(kind: str, folder: Path) -> str:
    """What to pass as --data."""
    if kind == "stdlib":
        return "stdlib"
    folder.mkdir()
    texts = ["".join(f"def function_{i}_{j}(x):\n    return x + {j}\n\n" for j in range(30)) for i in range(40)]
    if kind == "jsonl":
        (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(folder / "rows.jsonl")
    for i, text in enumerate(texts):
        (folder / f"module_{i:02d}.py").write_text(text)
    return str(folder)


def start(run: Path, options: Options, data: str) -> subprocess.Popen:
    mesh = ["--mesh", f"fsdp={options.devices}"] if options.devices > 1 else []
    arguments = [*NARROW, *mesh, "--steps", str(options.steps), "--data", data, "--run-dir", str(run)]
    return subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": str(options.devices)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def steps_logged(run: Path) -> int:
    """Training lines, one for three steps."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b'"loss"') if file.is_file() else 0


def being_saved(run: Path) -> bool:
    return any(run.glob("checkpoints/*orbax-checkpoint-tmp*"))


def kill_at_random(process: subprocess.Popen, run: Path, draw: random.Random, kill: int) -> str:
    """Kill a running process: some steps after its start, or as soon as a checkpoint is being written.

    Returns:
        A description of when it was killed.
    """
    if draw.random() < 0.15 and kill > 0:  # wherever it is then: importing, preparing, compiling
        time.sleep(draw.uniform(0, 6))
        moment = "at any moment" if process.poll() is None else "when it had ended"
    else:
        saving, before = kill == 0 or draw.random() < 0.5, steps_logged(run)
        wanted = before + draw.randint(1, 7)
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if saving and steps_logged(run) != before and being_saved(run):
                time.sleep(draw.uniform(0, 0.03))
                break
            if not saving and steps_logged(run) >= wanted:
                break
            time.sleep(0.0005)
        moment = "while it saved" if being_saved(run) else "while it trained"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return moment


def finish(run: Path, options: Options, data: str) -> str:
    process = start(run, options, data)
    said, _ = process.communicate(timeout=600)
    if process.returncode != 0:
        raise RuntimeError(f"the run ended with {process.returncode}:\n{said}")
    return said


def chaos(options: Options, folder: Path) -> dict[str, int]:
    """Run the experiment below a folder; returns how often the run was killed at what moment.

    Raises:
        AssertionError: the killed run has not come to what the undisturbed one has.
    """
    from tests.fingerprint import fingerprint

    data = write_data(options.data, folder / "data")
    draw, moments = random.Random(options.seed), {}
    calm, disturbed = folder / "calm", folder / "disturbed"
    finish(calm, options, data)
    for kill in range(options.kills):
        moment = kill_at_random(start(disturbed, options, data), disturbed, draw, kill)
        moments[moment] = moments.get(moment, 0) + 1
        print(f"kill {kill + 1}: {moment}, {steps_logged(disturbed)} lines logged", flush=True)
        if 3 * steps_logged(disturbed) > options.steps * 0.7:  # go back: a finished run cannot be disturbed
            kept = sorted(int(p.name) for p in (disturbed / "checkpoints").iterdir() if p.name.isdecimal())
            for step in kept[2:]:
                (disturbed / "checkpoints" / str(step)).rename(folder / f"gone-{kill}-{step}")
    finish(disturbed, options, data)
    wanted, got = fingerprint(calm), fingerprint(disturbed)
    differing = [name for name in wanted | got if wanted.get(name) != got.get(name)]
    assert not differing, f"after {options.kills} kills these differ: {differing}"
    return moments


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAXLLM_CACHE_DIR", str(Path(folder) / "cache"))
        began = time.monotonic()
        moments = chaos(options, Path(folder))
        counted = ", ".join(f"{count} {moment}" for moment, count in sorted(moments.items()))
        print(
            f"Killed {options.kills} times ({counted}): weights, moments, routing bias, random state, data position "
            f"and log are those of the undisturbed run, bit for bit ({time.monotonic() - began:.0f} s)"
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
