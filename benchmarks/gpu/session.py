"""One run of the command: its budget of time, its processes, and what later parts compare with."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.worker import ROOT, Failure, Worker
from jaxllm.plan.estimate import USABLE_MEMORY
from jaxllm.plan.targets import Target

ON_GPU = {
    "JAX_PLATFORMS": "cuda",  # no silent fall-back to the CPU
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": str(USABLE_MEMORY["cuda"]),
}
"""Of a process in which JAX computes on the GPU: it takes memory as it needs it, up to what a plan counts as usable."""

ON_CPU = {"JAX_PLATFORMS": "cpu"}


@dataclass
class Session:
    quick: bool
    ends: float
    """When the budget is used up, in seconds of `time.monotonic`."""
    target: Target | None
    """The data sheet of the card here, and what the plan compiles for; None: there is none of this card."""
    card: str = ""
    """The name of the card here."""
    plans: dict[bool, dict[str, Any]] = field(default_factory=dict)
    """`plan_as_json` of the step without and with remat."""
    flops_per_second: float | None = None
    """Of a large product in bfloat16."""
    bytes_per_second: float | None = None
    """Of device memory."""
    step_seconds: dict[bool, float] = field(default_factory=dict)
    """Of our step, without and with remat."""
    first_loss: float | None = None
    """Of our first step, in nats."""

    @property
    def rounds(self) -> int:
        return 1 if self.quick else 3

    @property
    def no_sheet(self) -> str:
        """What stands in place of a comparison with the data sheet."""
        return f"no data sheet for {self.card}"

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.ends - time.monotonic()

    def jax(self, function: str, **arguments: Any) -> Worker:
        """A process that prepares `module:function` of benchmarks, with JAX on the GPU."""
        environment = ON_CPU if self.quick else ON_GPU
        return Worker(f"benchmarks.{function}", environment=environment, limit=self.left, **arguments)

    def torch(self, function: str, **arguments: Any) -> Worker:
        """A process that prepares `module:function` of benchmarks, with the GPU for PyTorch."""
        return Worker(f"benchmarks.{function}", environment=ON_CPU, limit=self.left, **arguments)

    def command(self, *arguments: str) -> int:
        """Run a Python command of the checkout with JAX on the GPU; returns its exit status.

        Raises:
            Failure: it took longer than the budget, or it ended with an error; with the last line that it wrote.
        """
        environment = {**os.environ, **(ON_CPU if self.quick else ON_GPU)}
        try:
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", timeout=max(self.left, 1),
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise Failure(f"took longer than the {error.timeout:.0f} s that it had") from None
        if done.returncode > 1 or (done.returncode == 1 and "Traceback" in done.stderr):
            lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
            raise Failure(f"{' '.join(arguments[:2])} ended with code {done.returncode}: {lines[-1].strip()}")
        return done.returncode
