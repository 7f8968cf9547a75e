"""Signals that stop a run: it finishes its step, saves, and exits with its own code. A second Ctrl-C stops at once.

Several processes must stop after the same step. There SIGTERM is JAX's preemption notice, which its coordination
service passes on to all of them, and any other of these signals is turned into it.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""SIGHUP: the terminal was closed. SIGUSR1 and SIGUSR2: what batch systems send before the time limit."""


class StopRequest:
    """Whether a signal asked the run to stop."""

    def __init__(self):
        self.signal: signal.Signals | None = None  # the one that this process received

    @property
    def at_once(self) -> bool:
        """Whether to stop between two steps too: only where no other process has to stop at the same place."""
        return self.signal is not None and jax.process_count() == 1

    def after_step(self, step: int) -> bool:
        """Whether to stop after this step. Of several processes each must call it, after every step."""
        if jax.process_count() == 1:
            return self.signal is not None
        return multihost_utils.reached_preemption_sync_point(step)

    @property
    def exit_code(self) -> int:
        """The shells' code for a process that the signal ended."""
        return 128 + (self.signal or signal.SIGTERM)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within it the signals of `STOPPING` ask to stop instead of ending the process. Those that were ignored stay so.

    The main thread may be waiting for the device, where Python handles no signal, so a separate thread is notified. In
    threads other than the main one, where Python accepts no handlers, signals keep their effect.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    multiprocess = jax.process_count() > 1
    handled = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]  # `nohup` ignores SIGHUP
    handled = [number for number in handled if not (multiprocess and number == signal.SIGTERM)]
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)

    def listen() -> None:
        while numbers := os.read(receiver, 1):  # empty once the other end is closed
            number = signal.Signals(numbers[0])
            if number not in handled:
                continue
            if request.signal is not None and number == signal.SIGINT:
                print("\nstopped at once; the checkpoints are unchanged", file=sys.stderr, flush=True)
                os._exit(128 + number)
            request.signal = request.signal or number
            print(f"\n{number.name}: finishing the step and saving (Ctrl-C again: stop at once)", file=sys.stderr)
            if multiprocess:
                os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.signal(number, lambda *_: None) for number in handled}
    listener = threading.Thread(target=listen, daemon=True, name="signals")
    wakeup_before = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    listener.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(sender)
        listener.join()
        os.close(receiver)
