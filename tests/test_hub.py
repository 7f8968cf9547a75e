"""The Hub's stream through the real clients: whatever the server does, the same rows in the same order, or one line."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants

from jaxllm.config import TrainConfig
from jaxllm.config.groups import DataConfig
from jaxllm.data import hub_retry as patience
from jaxllm.data import hub_source
from jaxllm.data.hub_source import HubSource
from jaxllm.data.source import WHOLE, Shard
from jaxllm.data.sources import open_source
from jaxllm.data.stream import ProcessBatches
from jaxllm.data.tokenizer import train_tokenizer
from jaxllm.errors import UserError
from jaxllm.files import read_json
from jaxllm.run.arguments import parse_args
from jaxllm.run.prepare import prepare
from jaxllm.store.lock import FolderLock
from jaxllm.store.metrics_file import read_metrics
from tests.configs import NARROW_MODEL, open_files
from tests.hub_server import Fault, HubServer

NAME, CONFIG = "HuggingFaceTB/smollm-corpus", "cosmopedia-v2"
README = f"""---
configs:
- config_name: {CONFIG}
  data_files:
  - split: train
    path: {CONFIG}/train-*
- config_name: other
  data_files:
  - split: train
    path: other/*
---
"""


def shard_name(shard: int, shards: int) -> str:
    return f"{CONFIG}/train-{shard:05d}-of-{shards:05d}.parquet"


def corpus_files(shards: int = 3, rows: int = 30, words: int = 4, tag: str = "") -> dict[str, bytes]:
    """The dataset as it lies on the Hub."""
    files = {"README.md": README.encode()}
    for shard in range(shards):
        table = [
            {
                "prompt": "Write.",
                "text": f"{tag}shard {shard} row {row}: " + "once upon a time there was a story " * words,
                "token_length": words,
                "audience": "children",
                "format": "story",
                "seed_data": "web",
            }
            for row in range(rows)
        ]
        files[shard_name(shard, shards)] = parquet(table)
    return files


def parquet(rows: list[dict]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out, row_group_size=10)
    return out.getvalue()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with the corpus, which this process's clients ask. `time.sleep` does nothing."""
    with HubServer() as hub:
        hub.patch(monkeypatch, tmp_path / "home")
        hub.add("datasets", NAME, corpus_files())
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield hub


def open_hub(shard: Shard = WHOLE, **options: Any) -> HubSource:
    return HubSource(DataConfig(**{"source": NAME, "subset": CONFIG} | options), shard)


def texts(source: HubSource) -> list[str]:
    return [chunk.text for chunk in source.chunks()]


def expected(files: dict[str, bytes]) -> list[str]:
    tables = (pyarrow.parquet.read_table(io.BytesIO(files[name])) for name in sorted(files) if name.endswith("parquet"))
    return [text for table in tables for text in table.column("text").to_pylist()]


FAULTS = {
    "the connection drops": (Fault("drop", after=700), 1, "The Hub's client: "),
    "it drops until the client gives up": (Fault("drop", after=700), 8, "the stream is opened again in 1 s (retry 1)"),
    "busy, come again": (Fault("status", status=429, headers={"Retry-After": "3"}), 2, "429"),
    "busy until the client gives up": (Fault("status", status=503), 8, "The Hub: HTTP 503; the stream is opened again"),
    "no answer": (Fault("silent", seconds=5), 1, "timed out"),
    "a cut file, said to be whole": (Fault("short", after=700), 1, ""),
    "slow": (Fault("slow", seconds=0.4), 2, ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_changes_no_row(fault, hub, monkeypatch, capfd):
    """A line reports the cause of each wait, in the words of the Hub's client where it waits itself."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    fault, times, said = FAULTS[fault]
    source = open_hub()
    hub.fail(shard_name(1, 3), fault, times)
    assert texts(source) == expected(corpus_files())
    assert hub.downloads(shard_name(1, 3)) > times or fault.kind == "slow"
    out, err = capfd.readouterr()
    assert said in out
    assert err == ""
    lines = out.splitlines()
    assert all(line.startswith(("The Hub: ", "The Hub's client: ")) for line in lines)
    assert len(lines) >= times or not said


@pytest.mark.parametrize("path_end", ["/README.md", "/cosmopedia-v2", f"datasets/{NAME}", ".parquet"])
def test_faults_at_the_start_pass_as_well(path_end, hub, monkeypatch, capsys):
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(constants, name, 0.3)
    hub.fail(path_end, Fault("status", status=503), 7)
    hub.fail(path_end, Fault("silent", seconds=60), 1)
    asked = time.monotonic()
    assert texts(open_hub()) == expected(corpus_files())
    assert time.monotonic() - asked < 30  # some of the clients' requests would wait for ever
    assert "HTTP 503" in capsys.readouterr().out


def test_an_older_commit_in_the_clients_cache_is_never_taken_instead(hub):
    """As `datasets` does with what was once downloaded whole, where the Hub fails."""
    datasets.load_dataset(NAME, CONFIG, split="train")
    new = corpus_files(tag="new ")
    hub.add("datasets", NAME, new)
    hub.fail(f"/{CONFIG}", Fault("status", status=503), 7)
    assert texts(open_hub()) == expected(new)


def test_a_shard_that_is_gone_is_named(hub):
    source = open_hub()
    hub.remove("datasets", NAME, shard_name(2, 3))
    read = []
    with pytest.raises(UserError, match=rf"{NAME}.*{shard_name(2, 3)}.*404") as refused:
        read.extend(chunk.text for chunk in source.chunks())
    assert "\n" not in str(refused.value)


def test_a_damaged_shard_ends_the_run_and_not_the_pass(hub, capfd):
    files = corpus_files()
    files[shard_name(1, 3)] = files[shard_name(1, 3)][:-200] + bytes(200)
    hub.add("datasets", NAME, files)
    source = open_hub()
    with pytest.raises(UserError, match=rf"{NAME}.*cannot be read") as refused:
        texts(source)
    assert "\n" not in str(refused.value)
    assert hub.downloads(shard_name(1, 3)) >= patience.DAMAGED_TRIES
    assert capfd.readouterr().err == ""


def test_a_hub_that_never_answers_ends_in_one_line(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    monkeypatch.setattr(patience, "MAX_SECONDS", 0.3)
    source = open_hub()
    hub.fail(".parquet", Fault("silent", seconds=60), 1000)
    with pytest.raises(UserError, match=rf"{NAME}.*has not come for \d+ s \(.*timed out") as refused:
        texts(source)
    assert "\n" not in str(refused.value)


def test_a_hub_that_answers_nothing_at_the_start_is_not_waited_for(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.fail("", Fault("silent", seconds=60), 1000)
    with pytest.raises(UserError, match=f"{NAME}.*could not be reached"):
        open_hub()


def test_rows_without_text_are_skipped_and_counted_across_a_resume(hub):
    rows = [{"text": text} for text in ("one", None, "", "two", None, "three", "")]
    hub.add("datasets", NAME, {"README.md": README.encode(), shard_name(0, 1): parquet(rows)})
    whole = open_hub()
    assert texts(whole) == ["one", "two", "three"]
    assert whole.position["skipped"] == 4
    first, second = open_hub(), open_hub()
    chunks = first.chunks()
    assert [next(chunks).text, next(chunks).text] == ["one", "two"]
    second.position = json.loads(json.dumps(first.position))
    assert texts(second) == ["three"]
    assert second.position["skipped"] == 4


def test_a_field_that_is_no_text_is_skipped_and_counted(hub):
    hub.add("datasets", NAME, {"README.md": README.encode(), shard_name(0, 1): parquet([{"text": 5}, {"text": 6}])})
    source = open_hub()
    assert texts(source) == []
    assert source.position["skipped"] == 2


def test_each_pass_is_the_same(hub, capsys):
    source = open_hub()
    first = texts(source)
    assert texts(source) == first
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("shards", [3, 4])
def test_two_parts_have_nothing_in_common_and_together_everything(shards, hub):
    files = corpus_files(shards, rows=12)
    hub.add("datasets", NAME, files)
    parts = [texts(open_hub(Shard(part, 2))) for part in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(expected(files))
    assert len(parts[0]) == len(parts[1])


@pytest.mark.parametrize(("shards", "parts"), [(3, 1), (3, 2), (4, 2)])
def test_a_stream_continues_after_any_row(shards, parts, hub):
    hub.add("datasets", NAME, corpus_files(shards, rows=12))
    source = open_hub(Shard(parts - 1, parts))
    positions, wanted = [], []
    for chunk in source.chunks():
        wanted.append(chunk)
        positions.append(json.dumps(source.position))
    resumed = open_hub(Shard(parts - 1, parts))
    for i in range(0, len(wanted), 5):
        resumed.position = json.loads(positions[i])
        assert list(resumed.chunks()) == wanted[i + 1 :], i
    assert max(map(len, positions)) < 1000


def test_what_was_read_is_not_downloaded_again(hub):
    source = open_hub()
    chunks = source.chunks()
    for _ in range(75):  # behind the first row group of the last shard; within it the shard before is asked for too
        next(chunks)
    resumed = open_hub()
    before = [hub.downloads(shard_name(shard, 3)) for shard in range(3)]
    resumed.position = source.position
    assert len(texts(resumed)) == 15
    again = [hub.downloads(shard_name(shard, 3)) - count for shard, count in enumerate(before)]
    assert again[0] <= 1  # its schema, which names the fields
    assert again[1] == 0
    assert again[2] > 0


def test_a_run_keeps_its_commit_or_reports_that_it_is_gone(hub):
    source = open_hub()
    chunks = source.chunks()
    for _ in range(40):
        next(chunks)
    commit = source.position["revision"]
    new = corpus_files(tag="new ")
    hub.add("datasets", NAME, new)
    resumed = open_hub()
    assert texts(open_hub()) == expected(new)
    assert texts(open_hub(revision=commit)) == expected(corpus_files())
    resumed.position = source.position
    assert texts(resumed) == expected(corpus_files())[40:]
    hub.forget("datasets", NAME, commit)
    resumed.position = source.position
    with pytest.raises(UserError, match=rf"no longer has the commit {commit}.*--overwrite"):
        texts(resumed)


def test_a_split_that_is_not_there_is_refused_and_a_validation_split_is_evaluated(hub):
    with pytest.raises(UserError, match="has no split 'nosuch': pass --data-split, one of train"):
        open_hub(split="nosuch")
    assert {chunk.text for chunk in open_hub().held_out()} == {*texts(open_hub())[1::20]}
    validation = f"  - split: validation\n    path: {CONFIG}/dev*\n"
    more = README.replace("- config_name: other", f"{validation}- config_name: other")
    rows = parquet([{"text": f"validation {i}"} for i in range(9)])
    hub.add("datasets", NAME, corpus_files() | {"README.md": more.encode(), f"{CONFIG}/dev.parquet": rows})
    source = open_hub()
    assert [chunk.text for chunk in source.held_out()] == [f"validation {i}" for i in range(9)]
    (report,) = source.reports()
    assert "evaluated on the split 'validation'; nothing is held out" in report.evaluated
    assert report.seen.documents == 9
    assert not any(chunk.held_out for chunk in source.chunks())
    running = open_hub(hold_out="chunks")  # of a run that began before there was one
    assert any(chunk.held_out for chunk in running.chunks())


@pytest.mark.parametrize(
    "option", ["skip_data", "eval_data", "data_split", "text_field", "data_config", "data_revision"]
)
def test_no_option_is_ignored_for_a_dataset_of_the_hub(option, hub):
    config = TrainConfig.from_options(**{"data": NAME, "data_config": CONFIG, option: "nosuch"})
    with pytest.raises(UserError) as refused:
        next(open_source(config.data, config.seed).held_out())
    assert "nosuch" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_mistyped_path_is_not_only_the_hub_s_fault(hub, monkeypatch):
    with pytest.raises(UserError, match="there is no file or folder of that name"):
        open_source(TrainConfig.from_options(data="corpora/mine").data, 0)
    monkeypatch.setattr(hub_source, "hub_reachable", lambda: False)
    with pytest.raises(UserError, match="there is no file or folder 'corpora/mine', and the Hugging Face Hub"):
        open_source(TrainConfig.from_options(data="corpora/mine").data, 0)


# Below: the seed recipe. The slow tests start it in a separate process, as a user does.

SMALL = (
    "--preset", "customllm-768", "--recipe", "seed", *NARROW_MODEL, "--batch-size", "2",
    "--grad-accum", "2", "--steps", "6", "--save-every", "3", "--eval-every", "3", "--log-every", "1",
    "--eval-samples", "4", "--sample-tokens", "4", "--peak-tflops", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_files(corpus, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(open_files(corpus), 300).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def add_seed(hub: HubServer, tokenizer_files: dict[str, bytes]) -> None:
    """The recipe's dataset, of which 1,024 rows of 16 tokens are a part, and its tokenizer."""
    hub.add("datasets", NAME, corpus_files(shards=4, rows=40, words=3))
    hub.add("models", "HuggingFaceTB/cosmo2-tokenizer", tokenizer_files)


def test_the_seed_recipe_is_prepared_and_streams(hub, tokenizer_files, tmp_path):
    """All that precedes its first step, in this process; then rows, and the rows after a position."""
    add_seed(hub, tokenizer_files)
    config = parse_args([*SMALL, "--run-dir", str(tmp_path / "run")], "train.py", None, TrainConfig)
    with FolderLock(config.folder) as lock:
        config, tokenizer, held_out, _ = prepare(config, "JAX", lock)
    assert config.data.revision  # to which its evaluations keep as well
    assert held_out.shape == (4, 16)
    streams = [ProcessBatches(config.data, config.seed, 1, tokenizer, 0, config.data.batch_size) for _ in range(2)]
    streams[0].next_rows(50)
    streams[1].seek([*streams[0].position().values()])
    np.testing.assert_array_equal(*(stream.next_rows(50) for stream in streams))
    assert min(hub.downloads(shard_name(shard, 4)) for shard in range(4)) > 0


@pytest.fixture(scope="module")
def seed_hub(tokenizer_files):
    with HubServer() as hub:
        add_seed(hub, tokenizer_files)
        yield hub


def start(hub: HubServer, home: Path, run: Path, *options: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= hub.environment(home)
    command = [sys.executable, "train.py", *SMALL, "--run-dir", str(run), *options]
    root = Path(__file__).parents[1]
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def train(hub: HubServer, home: Path, run: Path, *options: str) -> subprocess.CompletedProcess:
    with start(hub, home, run, *options) as process:
        out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def losses(run: Path) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(run) if "loss" in line]


@pytest.mark.slow
def test_the_seed_recipe_streams_generates_and_resumes_through_faults(seed_hub, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    done = train(seed_hub, tmp_path / "home", whole)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Generated Text:") == 5
    assert [step for step, *_ in losses(whole)] == [1, 2, 3, 4, 5, 6]
    assert read_json(whole / "train_config.json")["data_revision"]  # to which its evaluations keep as well
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "6")  # as if it had been killed at step 5
    before = [seed_hub.downloads(shard_name(shard, 4)) for shard in range(4)]
    assert min(before) > 0
    seed_hub.fail(shard_name(3, 4), Fault("status"), 1)
    seed_hub.fail(shard_name(3, 4), Fault("drop", after=500), 1)
    done = train(seed_hub, tmp_path / "home", resumed, "--sample-tokens", "0")
    assert done.returncode == 0, done.stderr
    assert "Resuming from step 3" in done.stdout
    assert "503" in done.stdout
    assert "; the stream is opened again in 1 s (retry 1)" in done.stdout
    assert losses(resumed) == losses(whole)
    assert seed_hub.downloads(shard_name(1, 4)) == before[1]  # a shard that was read before the checkpoint


@pytest.mark.slow
def test_a_killed_run_equals_the_uninterrupted_one(seed_hub, tmp_path):
    options = ("--steps", "60", "--save-every", "5", "--eval-every", "60")
    done = train(seed_hub, tmp_path / "home", tmp_path / "whole", *options)
    assert done.returncode == 0, done.stderr
    process = start(seed_hub, tmp_path / "home", tmp_path / "killed", *options)
    while not (tmp_path / "killed" / "checkpoints" / "10").is_dir():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    done = train(seed_hub, tmp_path / "home", tmp_path / "killed", *options)
    assert done.returncode == 0, done.stderr
    assert "Resuming from step" in done.stdout
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_shard_that_goes_away_ends_the_run_with_one_line(seed_hub, tmp_path):
    seed_hub.fail(shard_name(1, 4), Fault("status", status=404), 100)
    done = train(seed_hub, tmp_path / "home", tmp_path / "run")
    seed_hub.heal()
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "step/s]" not in line and line.strip()]
    assert len(errors) == 1, errors
    assert errors[0].startswith(f"error: data: the dataset '{NAME}' on the Hub, file {shard_name(1, 4)},")
