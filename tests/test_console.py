"""Nothing decorative fails a run: neither its console nor what it draws and shows."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import train
from jaxllm.config import recipe
from jaxllm.errors import UserError
from jaxllm.run import reporting
from jaxllm.run.tensorboard import TensorBoardWriter, scalars
from jaxllm.store.metrics_file import read_metrics

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


@pytest.mark.slow
def test_what_a_console_cannot_encode_is_escaped(narrow, tmp_path, monkeypatch):
    written = io.BytesIO()
    console = io.TextIOWrapper(written, encoding="ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", console)
        arguments = ["--steps", "2", "--prompts", "Σωκράτης", "--run-dir", str(tmp_path / "λόγος")]
        assert train.main([*narrow, *arguments]) == 0
    assert b"Prompt: \\u03a3\\u03c9" in written.getvalue()
    assert "Σωκράτης" in (tmp_path / "λόγος" / "samples.md").read_text(encoding="utf-8")


def test_a_run_goes_on_without_what_it_draws_and_shows(narrow, tmp_path, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of ink")

    monkeypatch.setattr(reporting, "new_figure", broken)
    monkeypatch.setattr(reporting, "encode_prompt", broken)
    monkeypatch.setattr("jaxllm.run.tensorboard.socket", SimpleNamespace(gethostname=broken))
    assert train.main([*narrow, "--steps", "2", "--run-dir", str(tmp_path / "run")]) == 0
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


EVENTS = (  # as tensorboardX 2.6.5 encodes them, base64
    "GAAAAAAAAACjf0siCQAAAAAAAPg/Gg1icmFpbi5FdmVudDoyKihkbBAAAAAAAAAAlfv+GAkAAAAAAAD4PxCtAjoCCAHReUnUUgAAAAAAAAAl6we3"
    "CQAAAAAAAPg/EK0CKkQKEQoKdHJhaW4vbG9zcxUAABBAChcKEHRyYWluL3BhcmFtZXRlcnMVAABAQAoWCg90cmFpbi9ncmFkX25vcm0VAACAfwsH"
    "J94="
)


def test_tensorboard_events_are_the_bytes_that_libraries_write(tmp_path, monkeypatch):
    """A float beyond the range of float32 is infinite."""
    monkeypatch.setattr("jaxllm.run.tensorboard.time", SimpleNamespace(time=lambda: 1.5))
    board = TensorBoardWriter(tmp_path, first_step=300)
    board.write({"step": 301, "loss": 2.25, "parameters": 3, "grad_norm": 1e300, "epoch": 0.5})
    board.close()
    (file,) = tmp_path.glob("events.out.tfevents.*")
    assert file.read_bytes() == base64.b64decode(EVENTS)


def test_a_log_line_is_short_aligned_and_begins_at_its_beginning(narrow, tmp_path, capsys):
    """In a file there is no bar. A resumed run does not print the module tree again."""
    start = [*narrow, "--sample-tokens", "0", "--run-dir", str(tmp_path / "run")]
    assert train.main([*start, "--steps", "20"]) == 0
    said = capsys.readouterr()
    assert "\r" not in said.out + said.err
    lines = [line for line in said.out.splitlines() if line.startswith("step ") and "left" in line]
    assert len(lines) == 20
    assert len({len(line) for line in lines}) == 1
    assert max(len(re.sub(r"/\S+", "", line)) for line in said.out.splitlines()) <= 200  # besides paths
    assert "CustomLLM(" in said.out
    assert "step 20/20  evaluation loss" in said.out
    assert train.main([*start, "--steps", "21", "--log-format", "dict"]) == 0
    said = capsys.readouterr()
    assert "CustomLLM(" not in said.out
    assert "\n{'loss': " in said.out
    assert recipe("seed", "tiny").logging.log_format == "dict"


def test_closing_values_are_not_among_the_training_values_of_a_tracker(run):
    """The mean loss of the run would look like a spike at the last step."""
    records = read_metrics(run)
    end = scalars(records[-1])
    assert end["end/loss"] == records[-1]["train_loss"]
    assert not end.keys() & set().union(*(scalars(record) for record in records[:-1]))
    assert all(name.startswith(("train/", "eval/")) for record in records[:-1] for name in scalars(record))


class _Library(ModuleType):
    """The functions that wandb and trackio share, recorded."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__, self.calls = ModuleSpec(name, None), []

    def init(self, **options) -> None:
        self.calls.append(("init", options))

    def log(self, values, step) -> None:
        self.calls.append(("log", values | {"step": step}))

    def finish(self, **options) -> None:
        self.calls.append(("finish", options))


def test_the_log_goes_to_a_tracker_too(narrow, tmp_path, monkeypatch):
    library = _Library("trackio")
    monkeypatch.setitem(sys.modules, "trackio", library)
    options = ["--steps", "2", "--sample-tokens", "0", "--log-to", "trackio", "--run-dir", str(tmp_path / "run")]
    assert train.main([*narrow, *options]) == 0
    names = [name for name, _ in library.calls]
    assert names == ["init", *["log"] * 4, "finish"]
    assert library.calls[0][1]["config"]["steps"] == 2
    assert [values["step"] for _, values in library.calls[1:-1]] == [1, 2, 2, 2]
    assert library.calls[1][1]["train/loss"] == read_metrics(tmp_path / "run")[0]["loss"]


WANDB = """
import json, os
def _add(*call):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(call) + "\\n")
def init(**options): _add("init", options)
def log(values, step): _add("log", step)
def finish(exit_code=0): _add("finish", exit_code)
"""


@pytest.mark.slow
def test_a_resumed_run_is_the_same_one_in_wandb_and_an_error_ends_it_as_failed(narrow, tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setitem(sys.modules, "wandb", None)  # restored: it is not installed
    del sys.modules["wandb"]
    start = [*narrow, "--log-to", "wandb", "--sample-tokens", "0", "--run-dir", str(tmp_path / "run")]

    def failing(self, record):
        if record["step"] == 5:
            raise UserError("an error of the fifth step")

    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardWriter, "write", failing)
        assert train.main([*start, "--save-every", "4"]) == 2
    monkeypatch.delenv("WANDB_PROJECT")
    assert train.main([*start, "--steps", "6"]) == 0
    assert train.main([*start, "--steps", "6", "--overwrite"]) == 0
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    first, second, third = (options for name, options in calls if name == "init")
    assert [code for name, code in calls if name == "finish"] == [1, 0, 0]
    assert (first["project"], first["resume"]) == ("mine", "allow")
    assert (second["project"], second["id"], second["resume"]) == ("mine", first["id"], "allow")
    assert (third["project"], third["resume"]) == ("jaxllm", "allow")
    assert third["id"] != first["id"]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_folder_of_a_tracker_s_name_is_not_the_library(name, narrow, tmp_path, capsys, monkeypatch):
    (tmp_path / name / "run-1").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert train.main([*narrow, "--log-to", name, "--run-dir", str(tmp_path / "run")]) == 2
    assert f"log_to is '{name}': it is not installed" in capsys.readouterr().err


def test_a_tracker_that_is_not_installed_is_named_before_training(narrow, tmp_path, capsys):
    assert train.main([*narrow, "--log-to", "wandb", "--run-dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("error: log_to is 'wandb': it is not installed; pip install wandb")
