"""Reads and tokenizes batches ahead of the steps, in a thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxllm.data.stream import ProcessBatches, TokenStream

INTERRUPTIBLE = 0.2
"""Seconds between checks for an interruption while waiting for a batch."""

CLOSE_SECONDS = 5.0
"""Seconds that `close` waits for the batch that is being read."""


class Batch(NamedTuple):
    rows: np.ndarray  # (n,T) int32
    position: Any  # of the stream after this batch
    progress: float | None


class Prefetcher:
    """Reads and tokenizes the next batches in a thread, so that the step does not wait."""

    def __init__(self, stream: TokenStream | ProcessBatches, rows: int, depth: int = 4):
        """`rows`: what to ask `stream.next_rows` for."""
        self.waited = 0.0  # seconds that the reader has waited for batches
        self._queue: queue.Queue[Batch | Exception] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(stream, rows), daemon=True, name="prefetch")
        self._thread.start()

    def take(self, interrupted: Callable[[], bool] = lambda: False) -> Batch | None:
        """The next batch; None if `interrupted` becomes true while waiting."""
        asked, batch = time.perf_counter(), None
        while batch is None:
            try:
                batch = self._queue.get(timeout=INTERRUPTIBLE)
            except queue.Empty:
                if interrupted():
                    return None
        self.waited += time.perf_counter() - asked
        if isinstance(batch, Exception):
            self._queue.put(batch)  # the thread has ended: a second call must not wait
            raise batch
        return batch

    def close(self) -> None:
        """End the thread. One that waits for the Hub, which can take minutes, is abandoned."""
        self._stopped.set()
        until = time.monotonic() + CLOSE_SECONDS
        while self._thread.is_alive() and time.monotonic() < until:
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue

    def _run(self, stream: TokenStream | ProcessBatches, rows: int) -> None:
        while not self._stopped.is_set():
            try:
                batch = Batch(stream.next_rows(rows), stream.position(), stream.progress())
            except Exception as error:  # raised again by `take`
                self._queue.put(error)
                return
            self._queue.put(batch)
