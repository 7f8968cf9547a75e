"""Nothing decorative fails a run: neither its console nor what it draws and shows."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from jaxllm.run import reporting
from jaxllm.run.tensorboard import TensorBoardWriter

ROOT = Path(__file__).parents[1]


def closed_pipe() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize(
    "open_stream",
    [closed_pipe, lambda: os.fdopen(os.open("/dev/full", os.O_WRONLY), "w"), lambda: None],
    ids=["closed-pipe", "full-disk", "no-stream"],
)
def test_a_run_goes_on_without_its_console(open_stream, narrow, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", open_stream())
        patch.setattr(sys, "stderr", open_stream())
        arguments = ["--steps", "2", "--save-every", "2", "--run-dir", str(tmp_path / "run")]
        assert train.main([*narrow, *arguments]) == 0
        if sys.stdout is not None:
            sys.stdout.close()  # its buffer can be flushed
    assert (tmp_path / "run" / "samples.md").is_file()


def test_what_a_console_cannot_encode_is_escaped(narrow, tmp_path, monkeypatch):
    written = io.BytesIO()
    console = io.TextIOWrapper(written, encoding="ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", console)
        arguments = ["--steps", "1", "--prompts", "Σωκράτης", "--run-dir", str(tmp_path / "λόγος")]
        assert train.main([*narrow, *arguments]) == 0
    assert b"Prompt: \\u03a3\\u03c9" in written.getvalue()
    assert "Σωκράτης" in (tmp_path / "λόγος" / "samples.md").read_text(encoding="utf-8")


def test_a_run_goes_on_without_what_it_draws_and_shows(narrow, tmp_path, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of ink")

    monkeypatch.setattr(reporting, "new_figure", broken)
    monkeypatch.setattr(reporting, "encode_prompt", broken)
    monkeypatch.setattr("jaxllm.run.tensorboard._summary_writer", broken)
    assert train.main([*narrow, "--steps", "1", "--run-dir", str(tmp_path / "run")]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 3
    assert all("failed (RuntimeError: out of ink)" in line for line in warnings)


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "qtagg", "nonsense"])
def test_a_figure_needs_no_backend(backend, tmp_path):
    program = f"from jaxllm.run.reporting import new_figure; new_figure().savefig({str(tmp_path / 'x.png')!r})"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"MPLBACKEND": backend}, check=True)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_is_done_without_where_it_cannot_write(tmp_path, capsys):
    (tmp_path / "tensorboard").touch()
    board = TensorBoardWriter(tmp_path / "tensorboard", 0)
    board.write({"step": 1, "loss": 1.0})
    board.close()
    assert capsys.readouterr().err.startswith(f"warning: writing {tmp_path}/tensorboard failed (")
