"""What is data and what is not: formats, encodings, damage, and folders in which all of it lies side by side."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from jaxllm.config import TrainConfig
from jaxllm.config.groups import DataConfig
from jaxllm.data import file_source
from jaxllm.data.file_source import FileSource
from jaxllm.data.lines import kind_of
from jaxllm.data.sources import open_source
from jaxllm.data.stream import TokenStream
from jaxllm.data.tokenizer import train_tokenizer
from jaxllm.errors import UserError
from jaxllm.files import read_json
from jaxllm.run.prepare import prepare
from jaxllm.store.lock import FolderLock
from tests.configs import encode, held_out_of

TEXTS = [f'Row {i}: "grüße", 雪; it has\ttabs, commas and two\nlines ' + "words " * (i % 9) for i in range(60)]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(file_source, "WAIT", 0.0)


def open_files(path: Path, field: str = "text", **options) -> FileSource:
    return open_source(TrainConfig.from_options(data=str(path), text_field=field, **options).data, 0)


def texts(source: FileSource) -> list[str]:
    return [chunk.text for chunk in source.chunks()]


def lines(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def delimited(rows: list[dict], delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet(rows: list[dict], schema: pyarrow.Schema | None = None) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), out, row_group_size=7)
    return out.getvalue()


def arrow(rows: list[dict], new: Callable = pyarrow.ipc.new_stream) -> bytes:
    out, table = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    with new(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return out.getvalue()


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
BINARY = pyarrow.schema([("id", pyarrow.int64()), ("text", pyarrow.binary())])
FORMATS = {
    "a.jsonl": lines(ROWS),
    "a.JSONL": lines(ROWS),
    "a.ndjson": lines(ROWS),
    "mark.jsonl": "\ufeff".encode() + lines(ROWS),
    "wide.jsonl": lines(ROWS).decode().encode("utf-16"),
    "wider.jsonl.gz": gzip.compress(lines(ROWS).decode().encode("utf-32")),
    "a.jsonl.gz": gzip.compress(lines(ROWS)),
    "members.jsonl.gz": gzip.compress(lines(ROWS[:20])) + gzip.compress(lines(ROWS[20:])),
    "a.jsonl.zst": zstd(lines(ROWS)),
    "a.jsonl.bz2": bz2.compress(lines(ROWS)),
    "a.jsonl.xz": lzma.compress(lines(ROWS)),
    "lines.json": lines(ROWS),
    "array.json": json.dumps(ROWS).encode(),
    "indented.json": b"\n" + json.dumps(ROWS, indent=1).encode(),
    "mark.json.gz": gzip.compress("\ufeff".encode() + json.dumps(ROWS).encode()),
    "a.csv": delimited(ROWS, ","),
    "semicolons.csv": delimited(ROWS, ";"),
    "mark.CSV": "\ufeff".encode() + delimited(ROWS, ","),
    "a.tsv": delimited(ROWS, "\t"),
    "a.csv.gz": gzip.compress(delimited(ROWS, ",")),
    "a.parquet": parquet(ROWS),
    "binary.parquet": parquet([row | {"text": row["text"].encode()} for row in ROWS], BINARY),
    "stream.arrow": arrow(ROWS),
    "file.arrow": arrow(ROWS, pyarrow.ipc.new_file),
}
NESTED = {
    name: write([{"meta": {"text": text, "n": i}, "text": None} for i, text in enumerate(TEXTS)])
    for name, write in {"a.jsonl": lines, "a.parquet": parquet, "a.arrow": arrow}.items()
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_rows_and_continues_after_each(name, tmp_path):
    (tmp_path / name).write_bytes(FORMATS[name])
    check_rows_and_resumes(tmp_path, "text")


@pytest.mark.parametrize("name", NESTED)
def test_a_nested_field_is_read(name, tmp_path):
    (tmp_path / name).write_bytes(NESTED[name])
    check_rows_and_resumes(tmp_path, "meta.text")


def check_rows_and_resumes(folder: Path, field: str) -> None:
    source = open_files(folder, field)
    found, positions, progress = [], [], []
    for chunk in source.chunks():
        found.append(chunk.text)
        positions.append(json.dumps(source.position))
        progress.append(source.progress())
    assert found == TEXTS
    assert progress == sorted(progress)
    assert source.position["skipped"] == 0
    for at in range(0, len(found), 9):
        resumed = open_files(folder, field)
        resumed.position = json.loads(positions[at])
        assert texts(resumed) == found[at + 1 :]


TEXT = "Ein Märchen, 雪 und Schnee.\r\n" * 700
ENCODED = {
    "a.txt": TEXT.encode(),
    "A.TXT": TEXT.encode(),
    "mark.txt": TEXT.encode("utf-8-sig"),
    "wide.txt": TEXT.encode("utf-16"),
    "big-endian.txt": b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "wider.txt": TEXT.encode("utf-32"),
    "a.txt.gz": gzip.compress(TEXT.encode()),
    "a.md.zst": zstd(TEXT.encode()),
    "wide.txt.xz": lzma.compress(TEXT.encode("utf-16")),
}


@pytest.mark.parametrize("name", ENCODED)
def test_every_encoding_of_a_text_gives_the_same_chunks(name, tmp_path):
    (tmp_path / name).write_bytes(ENCODED[name])
    source = open_files(tmp_path / name)
    chunks, positions = [], []
    for chunk in source.chunks():
        chunks.append(chunk)
        positions.append(source.position)
    assert "".join(chunk.text for chunk in chunks) == TEXT.replace("\r\n", "\n")
    resumed = open_files(tmp_path / name)
    resumed.position = positions[2]
    assert list(resumed.chunks()) == chunks[3:]


BAD = {
    "a.txt": {
        "UTF-16 without a mark": ("plain words\n" * 50).encode("utf-16-le"),
        "Chinese UTF-16 without a mark": ("雪花落在山上。\n" * 50).encode("utf-16-be"),
        "Latin-1": ("très élégant, déjà vu\n" * 50).encode("latin-1"),
        "Cyrillic": ("Это русский текст.\n" * 50).encode("koi8-r"),
        "empty": b"",
        "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    },
    "a.jsonl": {
        "null": lines([{"text": None}] * 30),
        "another field": lines([{"id": {"body": "words"}}] * 30),
        "numbers": lines([{"text": 5}]),
        "UTF-16 without a mark": lines(ROWS).decode().encode("utf-16-le"),
        "a web page": b"<!DOCTYPE html>\n<p>404\n",
        "a long one of another field": lines([{"body": "words" * 100}] * 4000),
    },
    "a.jsonl.gz": {"no gzip": lines(ROWS), "cut at once": gzip.compress(lines(ROWS))[:20]},
    "a.jsonl.zst": {"no zstd": lines(ROWS)},
    "a.json": {"no JSON": b'[{"text": "a"}, {', "a package": b'{\n "name": "x"\n}\n', "an empty array": b"[]"},
    "a.csv": {"another field": delimited([{"body": "words", "id": 1}], ","), "empty rows": b"text,id\n,1\n,2\n"},
    "a.parquet": {
        "no rows": parquet([], pyarrow.schema([("text", pyarrow.string())])),
        "null": parquet([{"text": None}] * 30, pyarrow.schema([("text", pyarrow.string())])),
        "another field": parquet([{"body": "words", "meta": {"id": 1}}]),
        "no parquet": b"PAR1 no parquet",
        "cut": parquet(ROWS)[:-30],
    },
    "a.arrow": {"no arrow": b"ARROW1 no arrow", "another field": arrow([{"body": "words"}]), "cut": arrow(ROWS)[:400]},
    "image.png": {"an ending": b"\x89PNG"},
}
BAD_FILES = [pytest.param(name, what, id=f"{name} {what}") for name, contents in BAD.items() for what in contents]


@pytest.mark.parametrize(("name", "what"), BAD_FILES)
def test_a_bad_file_is_refused_alone_and_passed_over_beside_others(name, what, tmp_path):
    (tmp_path / name).write_bytes(BAD[name][what])
    with pytest.raises(UserError, match=name) as refused:
        list(open_files(tmp_path / name).chunks())
    if what == "another field":
        assert ("id.body" if name == "a.jsonl" else "body") in str(refused.value)
        assert "--text-field" in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match=name):
        list(open_files(tmp_path).chunks())
    (tmp_path / "good.jsonl").write_bytes(lines(ROWS))
    source = open_files(tmp_path)
    assert texts(source) == TEXTS
    assert name in "".join(source.notes)


def test_a_field_that_comes_late_or_only_at_times_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([{"id": 1}] * 50 + ROWS))
    (tmp_path / "b.jsonl").write_bytes(lines([{"text": None, "x": "y" * 100}] * 20_000 + ROWS))  # beyond the look
    source = open_files(tmp_path)
    assert sorted(texts(source)) == sorted(TEXTS * 2)
    assert source.position["skipped"] == 20_050


def test_thousands_of_pictures_do_not_flood_the_log(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    for i in range(1050):
        (tmp_path / f"{i}.jpg").touch()
    said = open_files(tmp_path).notes
    assert len(said) == 51
    assert "and 50 more" in said[-1]


def test_notes_beside_rows_without_the_field_are_no_data(tmp_path):
    for name in ("README.md", "load.py", "requirements.txt"):
        (tmp_path / name).write_text("words " * 90)
    (tmp_path / "small.csv").write_bytes(delimited([{"body": 1}], ","))  # code with a table
    assert len(texts(open_files(tmp_path))) == 3
    (tmp_path / "rows.jsonl").write_bytes(lines(ROWS))  # a folder of rows, and a wrong field
    with pytest.raises(UserError, match=r"no field 'txet', but id, text: pass --text-field"):
        open_files(tmp_path, "txet")


def test_code_with_a_few_rows_is_refused_until_the_user_says_what_to_read(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.py").write_text("code " * 90)
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "sample.jsonl").write_bytes(lines(ROWS[:3]))
    (tmp_path / "pkg.json").write_text('{"text": "x"}')
    with pytest.raises(UserError, match=r"30 files of text or code, .*more bytes.*--skip-data"):
        open_files(tmp_path)
    assert len(texts(open_files(tmp_path, skip_data="sample.jsonl,pkg.json"))) == 31
    source = open_files(tmp_path, skip_data="*.py")
    assert len(texts(source)) == 4
    assert "README.md" in " ".join(source.notes)
    assert len(texts(open_files(tmp_path, hold_out="count"))) == 4  # as formerly
    (tmp_path / "rows.parquet").write_bytes(parquet(ROWS * 9))
    (tmp_path / "more.jsonl").write_bytes(lines(ROWS * 9))
    assert len(texts(open_files(tmp_path))) == 4 + 18 * len(ROWS)


def test_a_folder_that_datasets_saved_is_read_without_its_caches(tmp_path):
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one", num_shards=3)
    (tmp_path / "one" / "cache-1234.arrow").write_bytes(arrow(ROWS))
    source = open_files(tmp_path / "one")
    assert sorted(texts(source)) == sorted(TEXTS)
    assert "cache-1234.arrow" in "".join(source.notes)
    datasets.DatasetDict({"train": saved, "test": saved.select(range(5))}).save_to_disk(tmp_path / "splits")
    assert sorted(texts(open_files(tmp_path / "splits"))) == sorted(TEXTS)
    assert texts(open_files(tmp_path / "splits", data_split="test")) == TEXTS[:5]
    with pytest.raises(UserError, match=r"no split 'dev'.*train, test"):
        open_files(tmp_path / "splits", data_split="dev")


CHATS = [[{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": "Yes."}] for i in range(50)]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(open_files(corpus), 300)


@pytest.mark.parametrize("write", [lines, parquet, arrow])
@pytest.mark.parametrize("field", ["text", "messages", "dialog"])
def test_chats_pass_the_tokenizer_s_template(write, field, tokenizer, tmp_path, monkeypatch):
    name = "dialog" if field == "dialog" else "messages"
    rows = [{"id": i, name: chat} for i, chat in enumerate(CHATS)]
    rows[7] = {"id": 7, name: [{"role": "tool", "content": "x"}]}  # which the template refuses
    (tmp_path / f"a.{ {lines: 'jsonl', parquet: 'parquet', arrow: 'arrow'}[write] }").write_bytes(write(rows))
    config = TrainConfig.from_options(data=str(tmp_path), text_field=field, seq_len=8, eval_samples=2)
    with pytest.raises(UserError, match="--tokenizer"):
        train_tokenizer(open_source(config.data, config.seed), 300)
    with pytest.raises(UserError, match="chat template"):
        held_out_of(config, tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    (chunk, *_) = open_source(config.data, config.seed).chunks()
    assert tokenizer.decode(encode(tokenizer, chunk.text, False)) == "<user>Question 0?<assistant>Yes."
    assert tokenizer.decode(held_out_of(config, tokenizer).rows[0]).startswith("<user>")
    stream = TokenStream(open_source(config.data, config.seed), tokenizer, DataConfig(seq_len=8), seed=0)
    monkeypatch.setattr("jaxllm.data.stream.POOL_ROWS", 4)
    stream.next_rows(400)
    assert (stream.skipped_rows, stream.position().source["pass"] > 1) == (1, True)  # counted once


def damaged_gzip(folder: Path, rows: int = 300) -> str:
    content = lines([{"text": random.Random(i).randbytes(600).hex()} for i in range(rows)])
    whole = gzip.compress(content)
    (folder / "bad.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    return "bad.jsonl.gz"


def damaged_parquet(folder: Path) -> str:
    rows = [{"text": random.Random(i).randbytes(600).hex()} for i in range(300)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "bad.parquet", row_group_size=50)
    content = bytearray((folder / "bad.parquet").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = b"\xff" * 4000
    (folder / "bad.parquet").write_bytes(content)
    return "bad.parquet"


def later_null(folder: Path) -> str:
    (folder / "bad.jsonl").write_bytes(lines([{"text": None, "x": "y" * 100}] * 20_000))
    return "bad.jsonl"


def damaged_text(folder: Path) -> str:
    content = gzip.compress(random.Random(0).randbytes(300_000).hex().encode())
    (folder / "bad.txt.gz").write_bytes(content[:200_000])
    return "bad.txt.gz"


@pytest.mark.parametrize("damage", [damaged_gzip, damaged_parquet, damaged_text, later_null])
@pytest.mark.parametrize("others", [2, 30])
def test_a_file_that_turns_out_bad_is_left_out_by_name(damage, others, tmp_path, capsys):
    for i in range(others):
        (tmp_path / f"{i:02}.jsonl").write_bytes(lines([{"text": f"good {i} {j}"} for j in range(5)]))
    bad = damage(tmp_path)
    source = open_files(tmp_path)
    chunks = list(source.chunks())
    first = [chunk.text for chunk in chunks]
    assert [text for i, text in enumerate(first) if text[:4] == "good" and i and not chunks[i - 1].ends_document] == []
    good = [text for text in first if text.startswith("good")]
    assert len(good) == 5 * others
    assert (len(first) > len(good)) == (damage is not later_null)  # what could be read was
    assert list(source.left_out) == [bad]
    said = capsys.readouterr().out
    assert said.count(bad) == 1
    assert damage is later_null or f"tried {file_source.TRIES} times" in said
    assert sorted(texts(source)) == sorted(good)  # not opened again
    assert bad not in capsys.readouterr().out.replace("Pass", "")
    (tmp_path / bad).write_bytes(lines([{"text": "mended"}]))  # it stays out
    resumed = open_files(tmp_path)
    resumed.position = json.loads(json.dumps(source.position))
    assert resumed.left_out.keys() == {bad}
    assert sorted(texts(resumed)) == sorted(good)
    (tmp_path / bad).unlink()
    resumed = open_files(tmp_path)
    with pytest.raises(UserError, match=f"--skip-data {bad}"):
        resumed.position = source.position
    resumed = open_files(tmp_path, skip_data=bad)
    resumed.position = source.position
    assert sorted(texts(resumed)) == sorted(good)


def test_a_file_that_can_be_read_again_is_not_left_out(tmp_path, monkeypatch):
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_bytes(lines([{"text": f"{i} {j}"} for j in range(50)]))
    wanted = texts(open_files(tmp_path))
    real, failures = file_source.read_chunks, iter([True, True] * 3)

    def failing(*arguments):
        for number, chunk in enumerate(real(*arguments)):
            if number == 20 and next(failures, False):
                raise file_source.Unreadable("[Errno 5] Input/output error")
            yield chunk

    monkeypatch.setattr(file_source, "read_chunks", failing)
    source = open_files(tmp_path)
    assert texts(source) == wanted
    assert source.left_out == {}


def change_size(file: Path) -> None:
    file.write_bytes(file.read_bytes() + lines([{"text": "another row"}]))


def change_content(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"5", b"6"))


@pytest.mark.parametrize("change", [change_size, change_content, Path.unlink])
def test_a_file_that_changes_while_a_run_reads_is_left_out(change, tmp_path):
    for i in range(25):
        (tmp_path / f"{i:02}.jsonl").write_bytes(lines([{"text": f"row {i} {j}"} for j in range(9)]))
    source = open_files(tmp_path)
    list(source.chunks())
    change(tmp_path / "05.jsonl")
    os.utime(tmp_path / "06.jsonl")  # this one has only a new date
    assert len(texts(source)) == 24 * 9
    assert list(source.left_out) == ["05.jsonl"]
    assert "changed" in source.left_out["05.jsonl"]


def test_a_folder_that_is_gone_leaves_no_file_out(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jsonl").write_bytes(lines(ROWS))
    source = open_files(folder)
    list(source.chunks())
    folder.rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"data' is gone.*resumes"):
        list(source.chunks())
    assert source.left_out == {}


def test_a_corpus_of_which_nothing_is_left_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(ROWS))
    source = open_files(file)
    list(source.chunks())
    change_size(file)
    with pytest.raises(UserError, match=r"every file .*a.jsonl \(it has changed since the run began"):
        list(source.chunks())


@pytest.mark.parametrize("pattern", ["03.jsonl", "sub/03.jsonl", "*3.jsonl", "nothing*, sub/*3.jsonl"])
@pytest.mark.parametrize("change", [Path.unlink, change_size, lambda file: None])
def test_a_running_run_leaves_out_what_it_is_told_to(pattern, change, tmp_path):
    (tmp_path / "sub").mkdir()
    for i in range(6):
        folder = tmp_path / "sub" if i % 2 else tmp_path
        (folder / f"{i:02}.jsonl").write_bytes(lines([{"text": f"row {i} {j}"} for j in range(9)]))
    source = open_files(tmp_path)
    chunks = source.chunks()
    before = [next(chunks).text for _ in range(12)]
    position = json.loads(json.dumps(source.position))
    change(tmp_path / "sub" / "03.jsonl")
    if change is Path.unlink and pattern in ("*3.jsonl", "nothing*, sub/*3.jsonl"):
        return  # a file that is gone must be named
    resumed = open_files(tmp_path, skip_data=pattern)
    if change is Path.unlink and pattern == "03.jsonl":
        return  # with its folder
    resumed.position = position
    rest = texts(resumed)
    assert not [text for text in rest if text.startswith("row 3")]
    want = {f"row {i} {j}" for i in range(6) for j in range(9) if i != 3}
    assert {*before, *rest} - {f"row 3 {j}" for j in range(9)} == want
    assert pattern.rpartition(" ")[2] in resumed.position["skip"]
    later = open_files(tmp_path, skip_data=pattern if change is Path.unlink else "")
    later.position = json.loads(json.dumps(resumed.position))  # the checkpoint knows it
    assert not [text for text in texts(later) if text.startswith("row 3")]


def test_run_folders_and_hidden_files_are_no_data(run, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    wanted = open_files(tmp_path).position
    shutil.copytree(run, tmp_path / "runs" / "tiny")
    for name in ("._a.jsonl", ".git/x.py", ".ipynb_checkpoints/a-checkpoint.jsonl", "runs/.x/y.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines(ROWS))
    (tmp_path / "loop").symlink_to(tmp_path)
    source = open_files(tmp_path)
    source.position = wanted
    assert texts(source) == TEXTS
    said = " ".join(source.notes)
    for name in ("._a.jsonl", ".git/", ".ipynb_checkpoints/", "runs/tiny/", "runs/.x/", "loop/"):
        assert name in said
    with pytest.raises(UserError, match="the folder of a run"):
        open_files(tmp_path / "runs" / "tiny")


def test_a_row_or_two_get_advice_that_helps(tokenizer, tmp_path):
    def advice(*contents: str) -> str:
        for file in tmp_path.iterdir():
            file.unlink()
        for i, content in enumerate(contents):
            (tmp_path / f"{i}.txt").write_text(content)
        with pytest.raises(UserError) as refused:
            held_out_of(TrainConfig.from_options(data=str(tmp_path)), tokenizer)
        return str(refused.value)

    assert "two rows or files" in advice("words " * 500)
    assert "smaller --seq-len" in advice("words " * 500, "few words")
    (tmp_path / "1.txt").write_text("words " * 500)
    assert len(held_out_of(TrainConfig.from_options(data=str(tmp_path)), tokenizer).rows) >= 1


# a run


@pytest.fixture
def narrow_run(tmp_path, monkeypatch, narrow_model):
    """Starts a run of 80 steps in a folder of 30 shards; `run` and `data` lie in it."""
    monkeypatch.chdir(tmp_path)
    for i in range(30):
        file = tmp_path / "data" / f"part-{i:02}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(lines([{"text": f"shard {i}, row {j}: " + "words " * 20} for j in range(4)]))
    monkeypatch.setattr("jaxllm.data.stream.POOL_ROWS", 4)

    def start(*options: str) -> int:
        """Later starts do the last step again, as if the run had been killed before it: one program for all."""
        shutil.rmtree("run/checkpoints/80", ignore_errors=True)
        options = (*options, "--steps", "80", "--sample-tokens", "0", "--save-every", "79", "--eval-every", "99")
        return train.main([*narrow_model, "--run-dir", "run", "--eval-samples", "2", "--batch-size", "16", *options])

    return start


@pytest.mark.slow
def test_a_run_outlives_bad_shards_and_other_names(narrow_run, capsys):
    Path("data/part-03.jsonl").write_bytes(lines([{"text": None}] * 9))
    Path("data/part-05.parquet").write_bytes(parquet([], pyarrow.schema([("text", pyarrow.string())])))
    damaged_gzip(Path("data"), rows=10)
    assert narrow_run("--data", "data") == 0
    said = capsys.readouterr().out
    assert "Not read: part-03.jsonl" in said
    assert "part-05.parquet (it has no rows)" in said
    assert "1 damaged files of the data were left out: bad.jsonl.gz" in said
    shutil.copytree("data", "moved")  # which gives it new dates
    change_content(Path("moved/part-15.jsonl"))
    before = Path("run/train_config.json").read_bytes()
    assert narrow_run("--data", "moved") == 2
    assert "data is 'moved', and the run has 'data'" in capsys.readouterr().err
    assert Path("run/train_config.json").read_bytes() == before
    shutil.rmtree("moved")
    Path("data").rename("moved")
    for name in ("part-03.jsonl", "part-05.parquet", "bad.jsonl.gz"):
        Path("moved", name).unlink()  # as the advice would be
    assert narrow_run("--data", "moved") == 0
    assert read_json(Path("run/train_config.json"))["skip_data"] == "bad.jsonl.gz"
    Path("moved/part-07.jsonl").unlink()
    assert narrow_run() == 2
    assert "one before 'part-08.jsonl' is gone" in (error := capsys.readouterr().err)
    assert "--skip-data" in error
    assert narrow_run("--skip-data", "bad.jsonl.gz,part-07.jsonl") == 0
    assert narrow_run() == 0  # the run keeps it
    change_content(Path("moved/part-15.jsonl"))
    assert narrow_run() == 2
    assert "'part-15.jsonl' has another content" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["data/", "./data", "{here}/data", "moved", "data/../data", "changed"])
def test_data_are_the_same_by_their_content(name, narrow_run, tmp_path):
    def start(data: str) -> str:
        config = TrainConfig.from_options(data=data, run_dir=Path("run"), seq_len=16, eval_samples=2)
        with FolderLock(config.folder) as lock:
            return prepare(config, "JAX", lock).config.data.revision

    revision = start("data")
    for copy in ("moved", "changed"):
        shutil.copytree("data", copy)
    change_content(Path("changed/part-05.jsonl"))
    if name == "changed":
        with pytest.raises(UserError, match="data is 'changed', and the run has 'data'"):
            start(name)
    else:
        assert start(name.format(here=tmp_path)) == revision
    assert start("data") == revision


def test_a_run_inside_its_data_is_none_of_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_bytes(lines(ROWS))
    config = TrainConfig.from_options(data=".", run_dir=Path("runs/tiny"), seq_len=16, eval_samples=2)
    revisions = set()
    for _ in range(3):
        with FolderLock(config.folder) as lock:
            revisions.add(prepare(config, "JAX", lock).config.data.revision)
        Path("runs/tiny/metrics.jsonl").write_bytes(lines(ROWS))
    assert len(revisions) == 1


# a folder of anything

DATA = {name: content for name, content in FORMATS.items() if "file" not in name} | {"a.TXT.gz": ENCODED["a.txt.gz"]}
NO_DATA = {
    **{f"{what}/{name}": content for name, contents in BAD.items() for what, content in contents.items()},
    **dict.fromkeys((".hidden.txt", "._a.jsonl", ".git/b.txt", "x.jsonl.incomplete", "LICENSE"), b"words " * 99),
    "runs/tiny/train_config.json": b"{}",
}
NOTES = ("README.md", "requirements.txt", "docs/LICENSE.txt", "load.py", "CHANGELOG.md", "notes.md", "README.txt.gz")
CORPUS = ("shakespeare.txt", "sub/history of the world.txt", "reading.txt", "versions of a tale.txt")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.sampled_from(sorted(DATA)), max_size=4, unique=True),
    no_data=st.lists(st.sampled_from(sorted(NO_DATA)), max_size=5, unique=True),
    notes=st.lists(st.sampled_from(NOTES), max_size=3, unique=True),
    corpus=st.lists(st.sampled_from(CORPUS), max_size=2, unique=True),
)
def test_a_folder_of_anything_gives_the_rows_that_a_reader_expects(rows, no_data, notes, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    contents = {f"data/{name}": DATA[name] for name in rows} | {name: NO_DATA[name] for name in no_data}
    contents |= {name: gzip.compress(b"a note") if name.endswith("gz") else b"a note" for name in notes}
    contents |= {name: f"tale {name}".encode() for name in corpus}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if "runs/tiny/train_config.json" in contents:
        (folder / "runs/tiny/metrics.jsonl").write_bytes(lines(ROWS))
    bytes_of = dict.fromkeys(("text", "lines", "csv", "parquet", "arrow", "json", None), 0)
    for name, content in contents.items():
        bytes_of[None if name.startswith((".", "runs/")) else kind_of(Path(name))] += len(content)
    has_rows = any(name != "a.TXT.gz" for name in rows)
    has_rows = has_rows or sum(bytes_of[kind] for kind in ("lines", "csv", "parquet", "arrow")) > bytes_of["text"]
    want = [text for name in rows for text in ([TEXT.replace("\r\n", "\n")] if name == "a.TXT.gz" else TEXTS)]
    want += [f"tale {name}" for name in corpus] + ([] if has_rows else ["a note"] * len(notes))
    try:
        source = open_files(folder)
        got, whole = [], ""
        for chunk in source.chunks():
            whole += chunk.text
            if chunk.ends_document:
                got, whole = [*got, whole], ""
    except UserError as error:
        if want:
            raise
        assert str(folder) in str(error)  # noqa: PT017
        return
    assert sorted(got) == sorted(want)
    said = " ".join(source.notes)
    passed_over = [*no_data, *(notes if has_rows else ())]
    for name in passed_over:
        parent = next((part for part in (".git/", "runs/tiny/") if name.startswith(part)), name)
        assert parent in said, (name, said)
    for name in {*contents} - {*passed_over}:
        assert f"{name} (" not in said


# a dataset with splits, in which anything may be damaged

LETTERS = "abc"
LAYOUTS = ("{split}-0000{i}.{kind}", "data/{split}_{i}.{kind}", "{split}/{letter}.{kind}", "{letter}{i}.{kind}")
SPLITS = ("train", "train", "validation", "test")
WRITE = {
    "jsonl": lines, "jsonl.gz": lambda rows: gzip.compress(lines(rows)), "json": lambda rows: json.dumps(rows).encode(),
    "csv": lambda rows: delimited(rows, ","), "tsv": lambda rows: delimited(rows, "\t"), "parquet": parquet,
    "arrow": arrow,
}  # fmt: skip
DAMAGED_ROW = {
    "jsonl": b'{"id": 1, "text": "cut\n', "csv": b'1,"stray\n', "tsv": b"1\ttoo\tmany\n",
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(
        ["{split}-0000{i}.{kind}", "data/{split}_{i}.{kind}", "{split}/{letter}.{kind}", "{letter}{i}.{kind}"]
    ),
    files=st.lists(
        st.tuples(
            st.sampled_from(["train", "train", "validation", "test"]), st.sampled_from(sorted(WRITE)), st.booleans()
        ),
        min_size=1,
        max_size=6,
    ),
    extra=st.sets(st.sampled_from(["README.md", "image.png", "broken.parquet", ".hidden.jsonl"])),
)
def test_of_a_dataset_with_splits_the_rows_of_one_are_read(layout, files, extra, tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits")
    texts_of: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    damaged = {"train": 0, "validation": 0, "test": 0}
    told = "split" in layout
    for i, (split, kind, damage) in enumerate(files):
        name = layout.format(split=split, i=i, letter=LETTERS[i % 3] + str(i), kind=kind)
        rows = [{"id": j, "text": f"{split} {i} row {j}: some words"} for j in range(12)]
        content = WRITE[kind](rows)
        if damage and kind in DAMAGED_ROW:
            newline = content.index(b"\n", content.index(b"row 5")) + 1
            content = content[:newline] + DAMAGED_ROW[kind] + content[newline:]
            damaged[split] += 1
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        texts_of.setdefault(split, []).extend(row["text"] for row in rows)
        names[name] = split
    for name in extra:
        (folder / name).write_bytes(b"words")
    has_splits = told and texts_of.keys() != {"train"}
    try:
        source = open_files(folder)
    except UserError as error:
        assert has_splits
        assert "train" not in texts_of or "broken.parquet" in extra
        assert "split" in str(error)  # noqa: PT017
        return
    want = texts_of["train"] if has_splits else [text for part in texts_of.values() for text in part]
    assert sorted(texts(source)) == sorted(want)
    assert source.position["skipped"] == (damaged["train"] if has_splits else sum(damaged.values()))
    said = " ".join(source.notes)
    assert all(name in said for name in extra)
    assert all((name in said) == (has_splits and split != "train") for name, split in names.items())
    if has_splits and "validation" in texts_of:
        assert sorted(chunk.text for chunk in open_files(folder).held_out()) == sorted(texts_of["validation"])
