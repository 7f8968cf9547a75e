"""Two real processes over gloo on loopback: the same run as one process with as many devices and data streams."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from encoding_kinds import tokenizer_of

from jaxllm.config import TrainConfig
from jaxllm.config.groups import DataConfig
from jaxllm.data.source import Shard
from jaxllm.data.stream import ProcessBatches, check_streams
from jaxllm.errors import UserError
from tests.configs import NARROW, open_files
from tests.fingerprint import fingerprint

ROOT = Path(__file__).parents[1]


def start(arguments: list[str], devices: int, environment: Mapping[str, str] = {}) -> subprocess.Popen:
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)} | environment
    return subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(processes: list[subprocess.Popen], code: int | list[int] = 0) -> list[tuple[str, str]]:
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = code if isinstance(code, list) else [code] * len(processes)
    assert [process.returncode for process in processes] == codes, said
    return said


def both(arguments: list[str], second: Sequence[str] = (), home: Path | None = None) -> list[subprocess.Popen]:
    """Two processes of two devices. Only the second gets the arguments `second`, only the first the folder `home`."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    meet = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2"]
    first = start([*arguments, *meet, "--process-id", "0"], 2, {} if home is None else {"HOME": str(home)})
    return [first, start([*arguments, *second, *meet, "--process-id", "1"], 2)]


def losses(folder: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.mark.slow
def test_two_processes_equal_one_and_one_resumes_their_run(narrow, tmp_path):
    """Four experts on four devices, two in each process: tokens cross between them. Then pmap in one process."""
    options = [*narrow, "--steps", "6", "--save-every", "2", "--eval-every", "6", "--keep-checkpoints", "3"]
    options += ["--seq-len", "8", "--grad-accum", "2", "--model.n-routed-experts", "4", "--model.dropout", "0.1"]
    mesh = ["--mesh", "expert=4"]
    one, two = tmp_path / "one", tmp_path / "two"
    finish([start([*options, "--data-streams", "2", "--run-dir", str(one)], 1)])
    (first, _), (second, _) = finish(both([*options, *mesh, "--run-dir", str(two)]))
    assert "mesh data=1 x fsdp=1 x expert=4" in first
    assert "Generated Text" in first
    printed = {line for line in first.splitlines() if line and "Gloo" not in line and "peer ranks" not in line}
    assert not printed & set(second.splitlines())  # gloo's own threads write there, several into one line
    assert json.loads((two / "train_config.json").read_text())["data_streams"] == 2
    np.testing.assert_allclose([*losses(two).values()], [*losses(one).values()], atol=2e-4)  # as they are printed

    for step in ("4", "6"):  # as if they had been killed after the second step
        shutil.rmtree(two / "checkpoints" / step)
    ((said, _),) = finish([start([*options, "--parallel", "pmap", "--run-dir", str(two)], 2)])
    assert "pmap over 2 devices" in said
    assert "Resuming from step 2" in said
    np.testing.assert_allclose([*losses(two).values()], [*losses(one).values()], atol=2e-4)
    assert fingerprint(two)["positions"] == fingerprint(one)["positions"]


@pytest.mark.slow
@pytest.mark.usefixtures("signals_by_default")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_both_after_the_same_step(number, narrow, tmp_path):
    """JAX passes the notice on; the run resumes as if it had not been stopped."""
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    options = [*narrow, "--mesh", "data=4", "--steps", "60", "--sample-tokens", "0"]
    finish(both([*options, "--run-dir", str(calm)]))
    processes = both([*options, "--run-dir", str(stopped)])
    while not (stopped / "metrics.jsonl").is_file() or '"step": 5,' not in (stopped / "metrics.jsonl").read_text():
        assert [process.poll() for process in processes] == [None, None]
        time.sleep(0.01)
    processes[1].send_signal(number)
    (_, first), (_, second) = finish(processes, code=[143, 128 + number])
    (line,) = (line for line in first.splitlines() if line.startswith("stopped after step"))
    assert line in second
    assert 5 <= int(line.split()[3]) < 60
    finish(both([*options, "--run-dir", str(stopped)]))
    assert fingerprint(stopped) == fingerprint(calm)


def test_an_error_in_the_primary_process_ends_both(narrow, tmp_path):
    (tmp_path / "file").write_text("not a run")
    options = [*narrow, "--mesh", "data=4", "--run-dir", str(tmp_path)]
    (_, first), (_, second) = finish(both(options), code=2)
    assert next(line for line in first.splitlines() if line.startswith("error")).startswith("error: run_dir is ")
    assert "error" not in second
    assert (tmp_path / "file").read_text() == "not a run"


@pytest.mark.slow
def test_a_problem_of_one_process_is_reported_before_anything_is_deleted(run, corpus, tmp_path):
    """The second process is given another batch size; then it cannot see the data, in the home of the first."""
    old, home = tmp_path / "old", tmp_path / "home"
    shutil.copytree(run, old)
    shutil.copytree(corpus, home / "corpus")
    options = [*NARROW, "--mesh", "data=4", "--overwrite", "--run-dir", str(old)]
    said = finish(both([*options, "--data", str(corpus)], second=["--batch-size", "8"]), code=2)
    assert all("error: batch_size is 8 in process 1 and 4 in process 0" in error for _, error in said), said
    said = finish(both([*options, "--data", "~/corpus"], home=home), code=2)
    assert all("error: process 1: data is '~/corpus'" in error for _, error in said), said
    assert (old / "checkpoints" / "20").is_dir()


CONFIG = TrainConfig.from_options(batch_size=8, grad_accum=2, seq_len=16)


def test_batches_depend_on_the_streams_and_not_on_the_processes(corpus):
    config = CONFIG.with_options(data=str(corpus), data_streams=4)
    tokenizer = tokenizer_of("Metaspace first")
    streams = config.data_streams
    whole = ProcessBatches(config.data, config.seed, streams, tokenizer, 0, 8)
    parts = [
        ProcessBatches(config.data, config.seed, streams, tokenizer, first, rows)
        for first, rows in ((0, 3), (3, 1), (4, 4))
    ]
    for _ in range(3):
        rows = whole.next_rows(2).reshape(2, 8, 16)
        np.testing.assert_array_equal(np.concatenate([p.next_rows(2).reshape(2, -1, 16) for p in parts], 1), rows)
    positions = {s: position for part in parts for s, position in part.position().items()}
    assert sorted(parts[2].position()) == [2, 3]
    later = ProcessBatches(config.data, config.seed, streams, tokenizer, 0, 8)
    later.seek([positions[s] for s in range(4)])
    np.testing.assert_array_equal(later.next_rows(1), whole.next_rows(1))


@pytest.mark.parametrize(("files", "rows"), [(3, 40), (25, 3), (50, 40)])
def test_shards_of_a_corpus_are_disjoint_and_complete(tmp_path, files, rows):
    """What is held out does not depend on the parts either: none trains on what another evaluates. Nor do bad rows."""
    for i in range(files):
        lines = [json.dumps({"text": f"{i} {j}"}) for j in range(rows)]
        (tmp_path / f"{i:02d}.jsonl").write_text("\n".join([*lines, "no JSON"]))
    skipped = []

    def read(part: int, parts: int) -> list[tuple[str, bool]]:
        source = open_files(tmp_path, Shard(part, parts))
        chunks = [(chunk.text, chunk.held_out) for chunk in source.chunks()]
        assert source.progress() == 1.0
        skipped.append(source.position["skipped"])
        return chunks

    whole, divided = read(0, 1), [read(part, 2) for part in range(2)]
    assert sorted(divided[0] + divided[1]) == sorted(whole)
    assert min(map(len, divided)) > 0.3 * len(whole)
    assert skipped[0] == files == skipped[1] + skipped[2]


def test_a_shard_without_text_is_refused(tmp_path):
    (tmp_path / "one.txt").write_text("few words")
    with pytest.raises(UserError, match="data_streams is 2: shard 1 of the data has nothing to train on"):
        check_streams(DataConfig(source=str(tmp_path)), 0, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coordinator": "here"}, "coordinator is 'here': it must be HOST:PORT or auto"),
        ({"coordinator": "a:1"}, "pass --num-processes and --process-id"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id is 2"),
        ({"num_processes": 2}, "need --coordinator"),
        ({"coordinator": "auto", "process_id": 0}, "leave out --num-processes"),
        ({"data_streams": 3}, "must divide batch_size = 8"),
    ],
)
def test_process_options_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        CONFIG.with_options(**changes)
