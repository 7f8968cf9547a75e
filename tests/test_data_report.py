"""What is held out and how much of it is read at the start; and the report of the data, the same in all places."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxllm.config import TrainConfig
from jaxllm.config.groups import DataConfig
from jaxllm.data import reading
from jaxllm.data.report import Counts
from jaxllm.data.source import utf8_bytes
from jaxllm.data.sources import open_source
from jaxllm.data.stream import TokenStream
from jaxllm.data.tokenizer import train_tokenizer
from jaxllm.errors import UserError
from jaxllm.files import read_json, write_json
from jaxllm.run.prepare import Prepared, prepare
from jaxllm.store import held_out_file
from jaxllm.store.lock import FolderLock
from jaxllm.store.metrics_file import read_metrics
from tests.configs import open_files


def write(file: Path, rows: int, words: int = 4) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": f"{file.stem} {i} " + "word " * words}) + "\n" for i in range(rows)))


def held_out_share(folder: Path) -> float:
    chunks = [*open_files(folder).chunks()]
    return sum(utf8_bytes(c.text) for c in chunks if c.held_out) / sum(utf8_bytes(c.text) for c in chunks)


@pytest.mark.parametrize("large", [0, 1, 7, 19, None])
@pytest.mark.parametrize("files", [20, 21, 45])
def test_a_twentieth_of_the_bytes_is_held_out_however_large_the_files(large, files, tmp_path):
    for i in range(files):
        write(tmp_path / f"{i:02}.jsonl", 4000 if i == large else 12)
    assert 0.02 < held_out_share(tmp_path) < 0.11
    (report,) = open_files(tmp_path).reports()
    assert ("whole file" in report.evaluated) == (large is None)
    assert report.share == pytest.approx(held_out_share(tmp_path), abs=0.02)
    assert f"{100 * report.share:.1f} %" in report.evaluated


def test_a_row_that_is_most_of_the_corpus_is_trained_on(tmp_path):
    for number in range(6):
        rows = [{"text": "long word " * 40_000 if i == number else f"row {i}"} for i in range(60)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert held_out_share(tmp_path) < 0.05
        source = open_files(tmp_path)
        assert sum(chunk.held_out for chunk in source.chunks()) in (2, 3)


@pytest.fixture
def counted_rows(monkeypatch) -> list[int]:
    count, real = [0], reading.read_rows

    def counting(*arguments):
        for row in real(*arguments):
            count[0] += 1
            yield row

    monkeypatch.setattr(reading, "read_rows", counting)
    return count


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(open_files(corpus), 300).save_pretrained(folder)
    return str(folder)


def start(run: Path, **options) -> Prepared:
    config = TrainConfig.from_options(run_dir=run, **options)
    with FolderLock(config.folder) as lock:
        return prepare(config, "JAX", lock)


def test_the_start_reads_what_is_held_out_once(tokenizer, tmp_path, counted_rows, capsys):
    """60 files of 2,000 rows: three are held out."""
    for i in range(60):
        write(tmp_path / "data" / f"{i:02}.jsonl", 2000)
    counted_rows[0] = 0
    options = {"data": str(tmp_path / "data"), "tokenizer": tokenizer, "seq_len": 64, "eval_samples": 10_000}
    first = start(tmp_path / "run", **options)
    assert 6000 <= counted_rows[0] <= 6061  # and one row of each file, to see that it has the field; and one of all
    said = capsys.readouterr().out
    assert "60 .jsonl files" in said
    assert "held out: 3 whole files, 5.0 % of the bytes" in said
    assert 118_000 < int(said.partition("about ")[2].partition(" ")[0].replace(",", "")) < 122_000
    counted_rows[0], report = 0, (tmp_path / "run" / "data_report.json").read_text()
    again = start(tmp_path / "run", **options)
    assert counted_rows[0] == 0
    np.testing.assert_array_equal(again.held_out, first.held_out)
    assert (tmp_path / "run" / "data_report.json").read_text() == report


CHANGES = {
    "more rows": {"eval_samples": 9},
    "another part of the data": {"skip_data": "01.jsonl"},
    "other text": {"eval_data": "other"},
}


@pytest.mark.parametrize("change", [*CHANGES, "damage", "another tokenizer"])
def test_kept_rows_are_made_again_where_they_would_be_others(change, tokenizer, tmp_path):
    for i in range(25):
        write(tmp_path / "data" / f"{i:02}.jsonl", 30)
    write(tmp_path / "other.jsonl", 50)
    options = {"data": str(tmp_path / "data"), "tokenizer": tokenizer, "seq_len": 16, "eval_samples": 5}
    first, file = start(tmp_path / "run", **options), tmp_path / "run" / held_out_file.FILE
    changes = CHANGES.get(change, {}) | ({"eval_data": str(tmp_path / "other.jsonl")} if change == "other text" else {})
    if change == "damage":
        file.write_bytes(file.read_bytes()[:-9])
    if change == "another tokenizer":  # with --overwrite, what the folder keeps is of the earlier run
        other = train_tokenizer(open_files(tmp_path / "data"), 280)
        other.save_pretrained(tmp_path / "other")
        changes = {"tokenizer": str(tmp_path / "other"), "overwrite": True}
    changed = start(tmp_path / "run", **options | changes)
    fresh = start(tmp_path / "fresh", **options | changes)
    np.testing.assert_array_equal(changed.held_out, fresh.held_out)
    assert (change == "damage") == np.array_equal(changed.held_out, first.held_out)


def test_the_report_is_the_same_in_all_places(run, tokenizer, tmp_path, capsys):
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["data"]
    assert first == read_json(run / "data_report.json")
    page = (run / "report.md").read_text()
    assert all(f"- {line}\n" in page for line in first["lines"])
    assert "25 .py files" in page
    assert all("step" in record for record in read_metrics(run))  # readers of the log do not see it

    for i in range(25):
        write(tmp_path / "data" / f"{i:02}.jsonl", 30)
    (tmp_path / "data" / "image.png").touch()
    start(tmp_path / "run", data=str(tmp_path / "data"), tokenizer=tokenizer, seq_len=16, eval_samples=5)
    said, report = capsys.readouterr().out, read_json(tmp_path / "run" / "data_report.json")
    assert all(f"Data: {line}\n" in said for line in report["lines"])
    assert all(f"Not read: {line}\n" in said for line in report["not_read"])
    assert "image.png" in report["not_read"][0]
    assert "passes over the data: about" in said


def test_seen_counts_documents_of_several_chunks():
    seen = Counts()
    for size, ends in ((5, False), (7, True), (3, True)):
        seen.add(size, ends)
    assert (seen.documents, seen.text_bytes, seen.longest) == (2, 15, 12)
    assert (seen + Counts(longest=99)).longest == 99


def test_a_run_of_before_resumes_to_the_same_rows(tokenizer, tmp_path):
    """Its config has no `hold_out`: it holds out by number, and reads a test split as it did."""
    for i in range(20):
        write(tmp_path / "data" / f"part-{i:02}.jsonl", 900 if i == 1 else 5)
    write(tmp_path / "data" / "test.jsonl", 5)
    options = {"data": str(tmp_path / "data"), "tokenizer": tokenizer, "seq_len": 16, "eval_samples": 5}
    with pytest.raises(UserError, match="it is not clear which files to train on"):
        start(tmp_path / "new", **options)
    start(tmp_path / "run", **options, data_split="all")
    config = read_json(tmp_path / "run" / "train_config.json")
    del config["hold_out"], config["eval_data"]
    write_json(tmp_path / "run" / "train_config.json", config | {"data_split": "train"})
    for _ in range(2):
        resumed = start(tmp_path / "run", **options)
        assert resumed.config.data.hold_out == "count"
        source = open_source(resumed.config.data, 0)
        chunks = [*source.chunks()]
        assert len(chunks) == 20 * 5 + 900
        assert {chunk.text.split()[0] for chunk in chunks if chunk.held_out} == {"part-01"}
    position = source.position
    assert position["pass"] == 1
    TokenStream(open_source(resumed.config.data, 0), resumed.tokenizer, DataConfig(seq_len=16), 0).next_rows(1)


def test_what_skip_data_names_must_be_there_when_a_run_begins(tokenizer, tmp_path):
    for name in "abc":
        write(tmp_path / "data" / f"{name}.jsonl", 40)
    options = {"data": str(tmp_path / "data"), "tokenizer": tokenizer, "seq_len": 16, "eval_samples": 2}
    with pytest.raises(UserError, match=r"skip_data is 'a.jsonl,d\*': no file of the data is 'd\*'"):
        start(tmp_path / "run", **options, skip_data="a.jsonl,d*")
    assert not (tmp_path / "run" / "train_config.json").exists()
    start(tmp_path / "run", **options, skip_data="a.jsonl")
    (tmp_path / "data" / "b.jsonl").unlink()
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    start(tmp_path / "run", **options | {"skip_data": "a.jsonl,b.jsonl"})


def test_rows_too_long_to_be_held_out_are_named_as_the_reason(tokenizer, tmp_path):
    write(tmp_path / "books.jsonl", 12, 9000)
    with pytest.raises(UserError, match=r"of its 12 rows, those.* other text as --eval-data"):
        start(tmp_path / "run", data=str(tmp_path / "books.jsonl"), tokenizer=tokenizer)
    write(tmp_path / "one.jsonl", 1)
    with pytest.raises(UserError, match=r"it is one row.* other text as --eval-data"):
        start(tmp_path / "run", data=str(tmp_path / "one.jsonl"), tokenizer=tokenizer)


@pytest.mark.parametrize(("files", "size"), [(1, 18_000), (2, 100), (3, 100), (2, 2_000_000)])
def test_the_share_of_chunks_is_counted_or_the_rule_is_named(files, size, tmp_path):
    for i in range(files):
        (tmp_path / f"{i}.txt").write_text("a line\n" * (size // 7))
    (report,) = open_files(tmp_path).reports()
    if size > 10**6:
        assert report.share is None
        assert report.evaluated == "held out: one chunk in 20"
    else:
        assert report.share == pytest.approx(held_out_share(tmp_path))
        assert f"{100 * report.share:.1f} % of the text" in report.evaluated


def report_of(tmp_path: Path, tokenizer: str, **options) -> dict:
    start(tmp_path / "run", tokenizer=tokenizer, seq_len=16, eval_samples=5, overwrite=True, **options)
    return read_json(tmp_path / "run" / "data_report.json")


def test_counts_are_exact_or_not_known(tokenizer, tmp_path):
    for i in range(20):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{i:02}.txt").write_text("a line of text\n" * 3000)
    write(tmp_path / "rows.jsonl", 3000)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    texts, packed, plain = (str(tmp_path / name) for name in ("texts", "rows.jsonl.gz", "rows.jsonl"))
    assert report_of(tmp_path, tokenizer, data=texts)["lines"][0].endswith("; 20 documents")
    assert "1 evaluated document: " in report_of(tmp_path, tokenizer, data=texts)["lines"][-2]  # in part
    assert report_of(tmp_path, tokenizer, data=packed)["lines"][0].endswith("; number of documents not known")
    line = report_of(tmp_path, tokenizer, data=plain)["lines"][0]
    assert "1 .jsonl file (" in line
    assert 2700 < int(line.partition("about ")[2].split()[0].replace(",", "")) < 3300

    lines = report_of(tmp_path, tokenizer, data=plain, eval_data=texts)["lines"]
    assert lines[0].endswith("; number of documents not known")
    assert lines[-1] == f"passes over the data: not known of {plain}"
    lines = report_of(tmp_path, tokenizer, data=plain, epochs=2.0)["lines"]
    assert lines[-1] == "passes over the data: 2, as --epochs says"


def test_the_report_of_a_mixture_lists_each_source(tokenizer, tmp_path):
    """Sources of the same size have equal counts; text that is evaluated in place of both is counted once."""
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", 200)
    data = f"{tmp_path / 'a.jsonl'}=1,{tmp_path / 'b.jsonl'}=1"
    *_, read, passes = report_of(tmp_path, tokenizer, data=data)["lines"]
    assert passes.count("about") == 2
    assert all(str(tmp_path / f"{name}.jsonl") in passes for name in "ab")
    report = report_of(tmp_path, tokenizer, data=data, eval_data=str(tmp_path / "c.jsonl"))
    documents = [source["seen"]["documents"] for source in report["sources"]]
    assert report["lines"][-2].startswith(f"{documents[0]} evaluated documents: ")
    read_of = [source["seen"]["documents"] for source in report_of(tmp_path, tokenizer, data=data)["sources"]]
    assert read.startswith(f"{sum(read_of)} evaluated documents: ")


def test_files_that_are_all_left_out_by_the_option_are_said_so(tmp_path):
    write(tmp_path / "a.jsonl", 3)
    source = open_source(TrainConfig.from_options(data=str(tmp_path), skip_data="a.jsonl").data, 0)
    with pytest.raises(UserError, match=r"is left out: by --skip-data$"):
        list(source.chunks())
