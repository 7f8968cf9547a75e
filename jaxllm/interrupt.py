"""SIGTERM and Ctrl-C: the run finishes its step, saves, and ends with a code of its own; Ctrl-C twice ends it at once.

Several processes must stop behind the same step. There SIGTERM is JAX's notice of preemption, which its coordination
service passes on to all of them, and Ctrl-C in any one is turned into it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Whether somebody has asked the run to stop."""

    def __init__(self):
        self.signal: signal.Signals | None = None  # that asked, where this process got it

    @property
    def at_once(self) -> bool:
        """Whether to leave off between two steps too: where nobody else has to leave off at the same place."""
        return self.signal is not None and jax.process_count() == 1

    def __call__(self, step: int) -> bool:
        """Whether to stop behind this step; of several processes each must ask, behind every step."""
        if jax.process_count() == 1:
            return self.signal is not None
        return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within it SIGTERM and SIGINT ask to stop instead of ending the process.

    The main thread may be waiting for the device, where Python handles no signal; so a thread of its own is told. In
    other threads than the main one, where Python takes no handlers, signals do what they did.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    several = jax.process_count() > 1
    handled = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    told, tell = os.pipe()
    os.set_blocking(tell, False)

    def listen() -> None:
        while numbers := os.read(told, 1):  # the other end is closed: nothing
            number = signal.Signals(numbers[0])
            if number not in handled:
                continue
            if request.signal is not None and number == signal.SIGINT:
                _say("stopped at once; the checkpoints are as they were")
                os._exit(128 + number)
            request.signal = request.signal or number
            _say(f"{number.name}: finishing the step and saving (Ctrl-C again: stop at once)")
            if several:
                os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.signal(number, lambda *_: None) for number in handled}
    listener = threading.Thread(target=listen, daemon=True, name="signals")
    wakeup_before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    listener.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(tell)
        listener.join()
        os.close(told)


def _say(line: str) -> None:
    """To the console, which may be gone: Ctrl-C ends what it is piped into as well."""
    with contextlib.suppress(OSError, ValueError):
        print(f"\n{line}", file=sys.stderr, flush=True)
