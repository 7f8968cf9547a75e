"""One run of the command: its budget of time, its processes, and what later rows compare with."""

import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.worker import ROOT, Failure, Worker
from jaxllm.devices import Target
from jaxllm.plan.estimate import USABLE_MEMORY

# of a process in which JAX computes on the GPU: it takes memory as it needs it, up to what a plan counts as usable
ON_GPU = {
    "JAX_PLATFORMS": "cuda",  # no silent fall-back to the CPU
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": str(USABLE_MEMORY["cuda"]),
}
ON_CPU = {"JAX_PLATFORMS": "cpu"}


@dataclass
class Session:
    quick: bool
    rounds: int
    gpu: bool = False  # whether it measures the parts of a GPU; with `quick` they run on the CPU
    ends: float = math.inf  # when the budget is used up, in seconds of `time.monotonic`
    target: Target | None = None  # the data sheet of the card here, for which a plan compiles; None: there is none
    card: str = ""  # the name of the card here
    # what later parts compare with, from the parts before them
    plans: dict[bool, dict[str, Any]] = field(default_factory=dict)  # `plan_as_json` of the step, by remat
    flops_per_second: float | None = None  # of a large product in bfloat16
    bytes_per_second: float | None = None  # of device memory
    step_seconds: dict[bool, float] = field(default_factory=dict)  # of our step, by remat
    first_loss: float | None = None  # of our first step, in nats

    @property
    def no_sheet(self) -> str:
        return f"no data sheet for {self.card}"

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.ends - time.monotonic()

    def __post_init__(self) -> None:
        self._environment = ON_GPU if self.gpu and not self.quick else ON_CPU

    def jax(self, function: str, **arguments: Any) -> Worker:
        return Worker(f"benchmarks.jax_side:{function}", self._environment, self.left, **arguments)

    def torch(self, function: str, **arguments: Any) -> Worker:
        # its JAX stays on the CPU
        return Worker(f"benchmarks.torch_side:{function}", ON_CPU, self.left, **arguments)

    def command(self, *arguments: str) -> int:
        """Run a Python command of the checkout; returns its exit status, or raises a Failure with its last line."""
        try:
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=ROOT, env={**os.environ, **self._environment}, capture_output=True, text=True, errors="replace",
                timeout=max(self.left, 1),
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise Failure(f"took longer than the {error.timeout:.0f} s that it had") from None
        if done.returncode > 1 or (done.returncode == 1 and "Traceback" in done.stderr):
            lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
            raise Failure(f"{' '.join(arguments[:2])} ended with code {done.returncode}: {lines[-1].strip()}")
        return done.returncode
