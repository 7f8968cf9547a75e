"""One side of a comparison in a separate process, which lives for the whole row and runs only in its turn.

The thread pools of JAX and PyTorch spin for a while after their work. In one process they would slow each other down,
and their peak memory could not be separated.
"""

import contextlib
import importlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from benchmarks.machine import busy_seconds
from jaxllm.run.huge_pages import huge_pages_environment

ROOT = Path(__file__).parents[1]

Result = TypeVar("Result")

# one piece of work; a dict that it returns has figures, of which `seconds` replaces the measured wall time
Contender = Callable[[], Any]
Prepared = tuple[dict[str, Contender], dict[str, Any]]  # what a worker can do, by name, and facts about it


class Failure(Exception):
    """A side could not be measured, for the reason in the message. The other rows continue."""


class Run(NamedTuple):
    seconds: float
    cpu_seconds: float  # of all threads; more reliable than wall time if other programs use the cores
    other_load: float  # mean number of cores used by other programs during the run
    figures: dict[str, float]

    def per(self, work: float, seconds: float | None = None) -> Self:
        """One unit of work; `seconds`: of it all, None: those of the run. CPU seconds are unknown."""
        return self._replace(seconds=(self.seconds if seconds is None else seconds) / work, cpu_seconds=0.0)


class Worker:
    """The parent's handle, a context manager: construction starts the process, entering waits until it is ready."""

    def __init__(self, prepare: str, environment: Mapping[str, str], limit: float = math.inf, **arguments: Any):
        """Run `prepare` (`module:function`) in a new process, which ends after `limit` seconds at the latest.

        It has the huge pages that train.py uses. Arguments are sent as JSON. Entering sets `contenders` and `facts`.
        """
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", prepare, json.dumps(arguments), str(limit)],
            cwd=ROOT, env={**os.environ, **huge_pages_environment(), **environment},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        self._limit = limit

    def go(self, contender: str) -> Run:
        """Run one contender once; raises a Failure if the process ends."""
        busy = busy_seconds()
        self._process.stdin.write(contender + "\n")
        self._process.stdin.flush()
        reply = self._reply()
        busy = busy_seconds() - busy
        elapsed, cpu = reply.pop("elapsed"), reply.pop("cpu")
        seconds = reply.pop("seconds", elapsed)
        return Run(seconds, cpu, max(0.0, busy - cpu) / max(elapsed, 1e-3), reply)

    def _reply(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if line:
            reply = json.loads(line)
            if "failed" in reply:
                self._process.wait()  # its memory is free then
                raise Failure(reply["failed"])
            return reply
        self._process.wait()
        if self._process.returncode == -signal.SIGALRM:
            raise Failure(f"took longer than the {self._limit:.0f} s that it had")
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines() or ["no message"]
        raise Failure(f"process ended with code {self._process.returncode}: {lines[-1]}")

    def __enter__(self) -> Self:
        """Wait until it is ready; raises a Failure if the process ends."""
        self.facts = self._reply()
        self.contenders: list[str] = self.facts.pop("contenders")
        return self

    def __exit__(self, *_exception) -> None:
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()


def repeated(work: Callable[[], object], quick: bool) -> Contender:
    """A contender that does short work for a second (`quick`: once). Its `seconds` is the median of one repetition."""

    def go() -> dict[str, float]:
        times, end = [], time.perf_counter() + (0 if quick else 1)
        while not times or time.perf_counter() < end:
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return {"seconds": statistics.median(times)}

    return go


def sustained(launch: Callable[[], Result], repetitions: int, wait: Callable[[Result], Any]) -> Contender:
    """A contender that launches the same work several times without waiting in between; `seconds` are those of one.

    `wait`: for the last result; it may return figures.
    """

    def go() -> dict[str, float]:
        started = time.perf_counter()
        for _ in range(repetitions):
            result = launch()
        waited = wait(result)
        taken = (time.perf_counter() - started) / repetitions
        return {"seconds": taken, **(waited if isinstance(waited, dict) else {})}

    return go


def serve(prepare: str, arguments: dict[str, Any], limit: float) -> None:
    """The child process: writes one line of JSON when ready, then one for each contender named on stdin.

    An error ends it; its type and first line are the last reply, its traceback goes to the log.
    """
    if limit < math.inf:
        signal.setitimer(signal.ITIMER_REAL, max(limit, 1e-3))  # its signal ends the process
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of the frameworks goes to the log

    def reply(values: dict[str, Any]) -> None:
        replies.write(json.dumps(values) + "\n")
        replies.flush()

    module, function = prepare.split(":")
    try:
        contenders, facts = getattr(importlib.import_module(module), function)(**arguments)
        reply({**facts, "contenders": list(contenders)})
        for line in sys.stdin:
            contender: Contender = contenders[line.strip()]
            cpu, started = time.process_time(), time.perf_counter()
            result = contender()
            elapsed = time.perf_counter() - started
            figures = result if isinstance(result, dict) else {}
            reply({"elapsed": elapsed, "cpu": time.process_time() - cpu, **figures})
    except Exception as error:
        traceback.print_exc()
        reply({"failed": ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])})
        sys.exit(1)


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3]))
