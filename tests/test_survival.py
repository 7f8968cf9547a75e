"""Signals, full disks, a second process: the run reports them in a line, keeps its checkpoints and can be resumed."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import train
from jaxllm.data import prefetch
from jaxllm.data.stream import TokenStream
from jaxllm.run.evaluation import Evaluator
from jaxllm.run.metrics import RunLog
from jaxllm.run.monitor import StepMonitor
from jaxllm.run.signals import STOPPING, stop_on_signals
from jaxllm.run.tensorboard import TensorBoardWriter
from jaxllm.store.lock import LOCK_FILE, FolderLock
from jaxllm.store.resume import choose_checkpoint
from tests.chaos import Options, chaos
from tests.fingerprint import fingerprint

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the files of this process to `size` bytes: the effect of a full disk, without filling one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("signals_by_default")
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        *(
            pytest.param(number, 128 + number, marks=pytest.mark.slow)
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
        ),
    ],
)
def test_a_signal_finishes_the_step_saves_and_ends_with_its_code(
    number, code, run, narrow, tmp_path, capsys, monkeypatch
):
    """And the run resumes from there as if it had not been stopped."""
    folder, write = tmp_path / "run", RunLog.write

    def signalling(log, record):
        write(log, record)
        if record["step"] == 13 and "loss" in record:
            os.kill(os.getpid(), number)
            time.sleep(0.5)  # the thread that is notified may get no time during seven steps of this size

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", signalling)
        assert train.main([*narrow, "--run-dir", str(folder)]) == code
    error = capsys.readouterr().err
    assert f"{number.name}: finishing the step and saving" in error
    newest = choose_checkpoint(folder).step
    assert newest in (13, 14)  # the signal may find the next step begun
    assert error.splitlines()[-1].startswith(f"stopped after step {newest} of 20, and saved")
    assert not (folder / LOCK_FILE).exists()
    assert train.main([*narrow, "--run-dir", str(folder)]) == 0
    assert f"Resuming from step {newest}" in capsys.readouterr().out
    assert fingerprint(folder) == fingerprint(run)


@pytest.mark.usefixtures("signals_by_default")
def test_every_stopping_signal_asks_to_stop_unless_it_is_ignored():
    """`nohup` and background jobs ignore some: those stay ignored."""
    before = [signal.getsignal(number) for number in STOPPING]
    for number in STOPPING:
        with stop_on_signals() as request:
            os.kill(os.getpid(), number)
            _until(lambda request=request: request.signal is not None)
        assert request.exit_code == 128 + number
    assert [signal.getsignal(number) for number in STOPPING] == before
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    with stop_on_signals() as request:
        for number in STOPPING:
            os.kill(os.getpid(), number)
        time.sleep(0.1)
    assert request.signal is None


@pytest.mark.usefixtures("signals_by_default")
def test_a_signal_between_two_lines_of_the_log_loses_no_loss(narrow, tmp_path, monkeypatch):
    """It arrives while the previous step is awaited; the next line's mean includes all steps."""
    arguments = [*narrow, "--log-every", "7", "--save-every", "50", "--eval-every", "50", "--sample-tokens", "0"]
    calm, stopped, flush = tmp_path / "calm", tmp_path / "stopped", StepMonitor.flush
    assert train.main([*arguments, "--run-dir", str(calm)]) == 0
    flushed = []

    def signalling(monitor, max_pending):
        flush(monitor, max_pending)
        flushed.append(max_pending)
        if len(flushed) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

    with monkeypatch.context() as patch:
        patch.setattr(StepMonitor, "flush", signalling)
        assert train.main([*arguments, "--run-dir", str(stopped)]) == 143
    assert flushed[9] == 1
    assert choose_checkpoint(stopped).step == 10
    assert train.main([*arguments, "--run-dir", str(stopped)]) == 0
    assert fingerprint(stopped) == fingerprint(calm)


@pytest.mark.usefixtures("signals_by_default")
def test_a_signal_while_waiting_for_data_saves_the_steps_done(run, narrow, tmp_path, monkeypatch):
    folder, next_rows, asked = tmp_path / "run", TokenStream.next_rows, []
    timer = threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM))

    def stalling(stream, count):
        asked.append(count)
        if len(asked) == 13:
            timer.start()
            threading.Event().wait()
        return next_rows(stream, count)

    with monkeypatch.context() as patch:
        patch.setattr(TokenStream, "next_rows", stalling)
        patch.setattr(prefetch, "CLOSE_SECONDS", 0.1)
        assert train.main([*narrow, "--run-dir", str(folder)]) == 143
    assert choose_checkpoint(folder).step == 12
    assert train.main([*narrow, "--run-dir", str(folder)]) == 0
    assert fingerprint(folder) == fingerprint(run)


@pytest.mark.slow
@pytest.mark.usefixtures("signals_by_default")
def test_an_interrupted_evaluation_is_repeated_at_the_next_start(run, narrow, tmp_path, monkeypatch):
    folder, evaluate = tmp_path / "run", Evaluator.__call__

    def interrupted(evaluator, state, epoch, step, asked):
        os.kill(os.getpid(), signal.SIGTERM)
        while not asked():
            time.sleep(0.001)
        return evaluate(evaluator, state, epoch, step, asked)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", interrupted)
        for _ in range(2):  # the second time the repeated evaluation is interrupted
            assert train.main([*narrow, "--run-dir", str(folder)]) == 143
            assert choose_checkpoint(folder).step == 10
    assert "eval_loss" not in (folder / "metrics.jsonl").read_text()
    assert train.main([*narrow, "--run-dir", str(folder)]) == 0
    assert fingerprint(folder) == fingerprint(run)


@pytest.mark.slow
@pytest.mark.usefixtures("signals_by_default")
def test_a_second_ctrl_c_ends_the_process_at_once(narrow, run, tmp_path):
    """Also while the main thread waits in a place where Python handles no signals: here a save that hangs."""
    program = "import sys, threading, train; from jaxllm.store.checkpoint_writer import CheckpointWriter\n"
    program += "CheckpointWriter.save = lambda *_: threading.Lock().acquire() and "
    program += "threading.Event().wait(); sys.exit(train.main())"
    folder = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "20")
    process = subprocess.Popen(
        [sys.executable, "-c", program, *narrow, "--run-dir", str(folder), "--steps", "5000", "--save-every", "5000"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    try:
        _until(lambda: '"step": 30' in (folder / "metrics.jsonl").read_text())
        process.send_signal(signal.SIGINT)
        for line in process.stderr:
            if "finishing the step" in line:
                break
        time.sleep(0.5)  # by now it hangs in the save
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert time.monotonic() - asked < 5
    finally:
        process.kill()
    assert "stopped at once" in process.stderr.read()
    assert choose_checkpoint(folder) == (10, [])


def _until(true) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("limit", "said"),
    [(100_000, "checkpoints/20 cannot be written"), pytest.param(1, "free space", marks=pytest.mark.slow)],
)
def test_a_disk_that_fills_up_ends_the_run_with_a_line(limit, said, run, narrow, tmp_path, capsys, monkeypatch):
    """With room for small files the checkpoint fails, without it the log does; the checkpoint before stays good."""
    folder, take = tmp_path / "run", StepMonitor.flush
    with contextlib.ExitStack() as stack:
        flushed = []

        def filling(monitor, max_pending):
            take(monitor, max_pending)
            flushed.append(max_pending)
            if len(flushed) == 15:
                _until((folder / "checkpoints" / "10").is_dir)
                stack.enter_context(largest_file(limit))

        monkeypatch.setattr(StepMonitor, "flush", filling)
        assert train.main([*narrow, "--run-dir", str(folder)]) == 2
    monkeypatch.undo()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("error: ")
    assert said in error.splitlines()[-1]
    assert choose_checkpoint(folder) == (10, [])
    assert train.main([*narrow, "--run-dir", str(folder)]) == 0
    assert "Resuming from step 10" in capsys.readouterr().out
    assert fingerprint(folder) == fingerprint(run)


@pytest.mark.slow
@pytest.mark.parametrize("every", ["1", "30"])  # the log finds the disk full, or the checkpoint does
def test_a_disk_that_is_really_full_ends_the_run_with_a_line(every, narrow, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("only root can make a small disk")
    options = ["--steps", "200", "--save-every", "5", "--keep-checkpoints", "99", "--log-every", every]
    try:
        command = [sys.executable, "train.py", *narrow, *options, "--run-dir", str(small / "run")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert "No space left on device" in done.stderr.splitlines()[-1]
        assert choose_checkpoint(small / "run").step >= 5
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_run_continues_without_tensorboard_where_the_disk_is_full(tmp_path, capsys):
    board = TensorBoardWriter(tmp_path, 0)
    with largest_file(1000):
        for step in range(50):
            board.write({"step": step, "loss": 1.0})
        board.close()
    assert (
        capsys.readouterr().err == "warning: TensorBoard's events are no longer written ([Errno 27] File too large)\n"
    )


def test_a_second_process_on_the_folder_is_refused_with_the_first_one_s_name(run, narrow, tmp_path, capsys):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    before = sorted(folder.rglob("*"))
    for options in ([], ["--overwrite"]):
        with FolderLock(folder) as lock:
            lock.take()
            assert train.main([*narrow, *options, "--run-dir", str(folder)]) == 2
            assert f"process {os.getpid()} on " in capsys.readouterr().err
        assert sorted(folder.rglob("*")) == before


def test_a_folder_where_nothing_can_be_written_is_named(narrow, capsys):
    assert train.main([*narrow, "--run-dir", "/proc/run"]) == 2
    assert "run_dir is '/proc/run': nothing can be written there" in capsys.readouterr().err


def test_a_disk_without_room_for_a_checkpoint_is_named_before_training(narrow, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert train.main([*narrow, "--run-dir", str(tmp_path / "run")]) == 2
    assert "a checkpoint takes 0.0 GB and 0.0 GB are free" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_killed_three_times_equals_the_uninterrupted_one(tmp_path):
    """`python -m tests.chaos --kills 30` does it thirty times."""
    moments = chaos(Options(kills=3, steps=40, data="jsonl", seed=1), tmp_path)
    assert moments["while it saved"] >= 1
    assert "when it had ended" not in moments
