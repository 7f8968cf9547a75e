"""Corners of the sources: few files, broken text, the end of a pass, and going on within a file, from any place."""

from __future__ import annotations

import io
import json
import random
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxllm.config.groups import DataConfig
from jaxllm.data import lines, prefetch, rows
from jaxllm.data import stream as streams
from jaxllm.data.file_source import FileSource
from jaxllm.data.prefetch import Prefetcher
from jaxllm.data.reading import CHUNK_CHARS, FileChunk, read_chunks
from jaxllm.data.source import Shard, TextChunk
from jaxllm.data.sources import stdlib_files
from jaxllm.data.stream import TokenStream
from jaxllm.data.tokenizer import train_tokenizer
from jaxllm.errors import UserError
from tests.configs import open_files


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(open_files(corpus), 300)


def test_a_few_small_files_leave_something_to_evaluate_on(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"file {i}\n")
    chunks = list(open_files(tmp_path).chunks())
    assert [chunk.held_out for chunk in chunks].count(True) == 1


def test_half_a_surrogate_pair_is_replaced(tmp_path, tokenizer):
    (tmp_path / "data.jsonl").write_text('{"text": "a\\ud800b"}\n')
    (chunk,) = open_files(tmp_path).chunks()
    assert tokenizer.decode(tokenizer(chunk.text)["input_ids"]) == "a?b"


def test_progress_grows_within_a_file(tmp_path):
    (tmp_path / "one.txt").write_text("line é\n" * 4000)
    source = open_files(tmp_path)
    seen = [source.progress() for _ in source.chunks()]
    assert seen == sorted(set(seen))
    assert seen[-1] == pytest.approx(1.0)
    assert source.progress() == 1.0


def test_a_stream_continues_from_the_end_of_a_pass(corpus, tokenizer):
    def fresh():
        return TokenStream(open_files(corpus), tokenizer, DataConfig(seq_len=32), seed=0)

    at_the_end, from_the_start = fresh(), fresh()
    files = len(open_files(corpus).files)
    source = at_the_end.position().source | {"pass": 1, "file": files}
    at_the_end.seek(at_the_end.position()._replace(source=source))
    from_the_start.seek(from_the_start.position()._replace(source=source | {"pass": 2, "file": 0}))
    np.testing.assert_array_equal(at_the_end.next_rows(4), from_the_start.next_rows(4))


def test_held_out_text_alone_is_refused(corpus, tokenizer):
    source = open_files(corpus)
    source.chunks = lambda chunks=source.chunks: (chunk._replace(held_out=True) for chunk in chunks())
    with pytest.raises(UserError, match="there is nothing to train on"):
        TokenStream(source, tokenizer, DataConfig(seq_len=32), seed=0).next_rows(1)


def test_a_prefetcher_raises_its_error_each_time(corpus, tokenizer):
    """A second call must not wait for a thread that has ended."""
    source = open_files(corpus)
    source.chunks = lambda: (_ for _ in ()).throw(UserError("data: gone"))
    batches = Prefetcher(TokenStream(source, tokenizer, DataConfig(seq_len=32), seed=0), 1)
    for _ in range(2):
        with pytest.raises(UserError, match="data: gone"):
            batches.take()
    batches.close()


def pieces_in_text_mode(file: Path) -> Iterator[tuple[str, bool]]:
    """What a text file's chunks are: Python's text mode, from the start."""
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        chunk = ""
        while line := lines.readline(CHUNK_CHARS):
            if chunk and len(chunk) + len(line) > CHUNK_CHARS:
                yield chunk, False
                chunk = ""
            chunk += line
    if chunk:
        yield chunk, True


def parts_of(file: Path, place: int = 0) -> list[FileChunk]:
    return list(read_chunks(file, file.stat().st_size, place, "text"))


def test_the_standard_library_s_pieces_are_those_of_text_mode():
    for file in stdlib_files(Path(sysconfig.get_path("stdlib"))).files.values():
        assert [(part.text, part.ends_document) for part in parts_of(file)] == list(pieces_in_text_mode(file)), file


BITS = {
    "line ends": [b"\r", b"\n", b"\r\n", b"a", "\u2028\x85".encode()],
    "characters of every length": [text.encode() for text in "aé€\U0001f600\ufffd\ufeff"],
    "no UTF-8": [b"\xe2\x82", b"\xf0\x9f\x98", b"\xff", b"\xed\xa0\x80", b"\xc0", b"\x80", b"a", b"\n", "é".encode()],
    "about as long as a chunk": [
        b"x" * (CHUNK_CHARS + i) + end for i in (-2, -1, 0) for end in (b"\r\n", b"\n", b"\r", b"")
    ],
}


@pytest.mark.parametrize("bits", BITS)
def test_any_bytes_give_text_mode_s_chunks_and_continue_after_each(bits, tmp_path):
    chosen = random.Random(bits)
    for i, size in enumerate((1, 30, 3000, 30_000)):
        file = tmp_path / f"{i}.txt"
        file.write_bytes(b"".join(chosen.choices(BITS[bits], k=size if len(BITS[bits]) < 12 else size // 100 + 1)))
        parts = parts_of(file)
        assert [(part.text, part.ends_document) for part in parts] == list(pieces_in_text_mode(file))
        for at in chosen.choices(range(len(parts)), k=5):
            assert parts_of(file, parts[at].offset) == parts[at + 1 :]
        assert parts[-1].offset == file.stat().st_size


class CountedReads(io.FileIO):
    """A file that knows how much was read of it, in all of its openings."""

    count = 0

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        CountedReads.count += len(data)
        return data


def write_rows(file: Path, rows: int) -> None:
    texts = [f"row {i}: " + "words that no codec makes short ".join(map(str, range(i, i + 30))) for i in range(rows)]
    if file.suffix == ".parquet":
        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(table, file, row_group_size=50, compression="none", use_dictionary=False)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        file.write_text("\n".join(texts))


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_resuming_near_the_end_of_a_large_file_reads_only_the_end(kind, tmp_path, monkeypatch):
    file = tmp_path / f"big.{kind}"
    write_rows(file, 5000)
    source = open_files(file)
    positions = []
    wanted = []
    for chunk in source.chunks():
        wanted.append(chunk)
        positions.append(json.dumps(source.position))
    monkeypatch.setattr(Path, "open", lambda path, mode: CountedReads(path, mode))
    CountedReads.count = 0
    resumed = open_files(file)
    resumed.position = json.loads(positions[-20])
    assert list(resumed.chunks()) == wanted[-19:]
    assert file.stat().st_size > 4e6
    # The blocks behind the place; of a parquet file the end, which says where the rest is, and a row group of 50 rows.
    assert 0 < CountedReads.count < 3 * lines.BLOCK + (200_000 if kind == "parquet" else 20 * CHUNK_CHARS)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_source_continues_after_any_chunk(kind, parts, tmp_path):
    for i in range(2):
        write_rows(tmp_path / f"{i}.{kind}", 130)
    for part in range(parts):
        source = open_files(tmp_path, Shard(part, parts))
        positions, wanted = [], []
        for chunk in source.chunks():
            wanted.append(chunk)
            positions.append(json.dumps(source.position))
        for at in range(0, len(wanted), 7):
            resumed = open_files(tmp_path, Shard(part, parts))
            resumed.position = json.loads(positions[at])
            assert list(resumed.chunks()) == wanted[at + 1 :]
        assert max(map(len, positions)) < 400


def changed_name(folder: Path) -> None:
    (folder / "b.txt").rename(folder / "bb.txt")


CHANGES = {
    "added": (lambda folder: (folder / "aa.txt").write_text("new"), r"3 then, 4 now; .*: 'aa.txt' is new.*move it"),
    "added at the end": (lambda folder: (folder / "d.txt").write_text("new"), r"3 then, 4 now; .*'d.txt' is new"),
    "removed": (
        lambda folder: (folder / "b.txt").unlink(),
        r"3 then, 2 now; .*: one before 'c.txt' is gone.*--skip-data",
    ),
    "removed at the end": (lambda folder: (folder / "c.txt").unlink(), r"3 then, 2 now; .*one after 'b.txt' is gone"),
    "grown": (lambda folder: (folder / "b.txt").write_text("longer " * 9), r"'b.txt' has another content.*--skip-data"),
    "edited": (lambda folder: (folder / "b.txt").write_text("edit b\n"), r"'b.txt' has another content"),
    "renamed": (changed_name, r"3 then, 3 now; first difference: 'bb.txt' is new"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_resume_with_other_files(change, tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"file {name}\n")
    position = open_files(tmp_path).position
    open_files(tmp_path).position = position
    do, said = CHANGES[change]
    do(tmp_path)
    with pytest.raises(UserError, match=said) as refused:
        open_files(tmp_path).position = position
    assert str(tmp_path) in str(refused.value)
    assert "--overwrite" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_data_may_move_to_another_folder(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text("one")
        (tmp_path / folder / "sub" / "b.txt").write_text("two")
    position = open_files(tmp_path / "here").position
    open_files(tmp_path / "there").position = position


def test_a_position_of_another_kind_of_data_is_refused(corpus):
    with pytest.raises(UserError, match=r"other data or of an earlier version.*--overwrite"):
        open_files(corpus).position = {"pass": 0, "row": 0, "stream": None}


def test_a_line_that_is_too_long_is_passed_over_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 100)
    monkeypatch.setattr(rows, "BLOCK", 64)
    monkeypatch.setattr(lines, "BLOCK", 64)
    texts = ["first", "x" * 1000, "second", "y" * 60, "z" * 5000]
    for end in ("\n", "\r\n"):
        file = tmp_path / "rows.jsonl"
        file.write_bytes("".join(json.dumps({"text": text}) + end for text in texts).encode())
        source = open_files(file)
        assert [chunk.text for chunk in source.chunks()] == ["first", "second", "y" * 60]
        assert source.position["skipped"] == 2
        assert len(max(parts_of(file), key=lambda part: len(part.text or "")).text) == 60


def test_the_count_of_skipped_rows_survives_a_resume(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(streams, "POOL_ROWS", 4)
    good = ["{bad", *(json.dumps({"text": f"row {i} " * 20}) for i in range(10)), '{"text": 7}', "[]"]
    (tmp_path / "rows.jsonl").write_text("\n".join(good))

    def fresh() -> TokenStream:
        return TokenStream(open_files(tmp_path), tokenizer, DataConfig(seq_len=16), seed=0)

    whole, first, second = fresh(), fresh(), fresh()
    whole.next_rows(400)
    first.next_rows(4)  # a part of the first pass: a later one skips the same
    second.seek(first.position())
    second.next_rows(396)
    assert (first.skipped_rows, second.skipped_rows, whole.skipped_rows) == (1, 3, 3)


def test_broken_rows_are_skipped_and_broken_bytes_replaced(tmp_path):
    lines = [b'{"text": "a\xff\xe2\x82b"}', b'{"text": "cut', b"\xff\xfe", b'{"text": null}', b'{"text": ["a"]}', b""]
    lines.append(b'{"text": "' + b"x" * 800 + b'"}')
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    source = open_files(tmp_path)
    assert [chunk.text for chunk in source.chunks()] == ["a\ufffd\ufffdb", "x" * 800]
    assert source.position["skipped"] == 4


def test_passes_that_are_read_ahead_are_not_announced(tmp_path, tokenizer, capsys):
    """The pool holds many passes of a tiny corpus before the first row of the second is trained on."""
    (tmp_path / "a.txt").write_text("one two three\n" * 10)
    stream = TokenStream(open_files(tmp_path), tokenizer, DataConfig(seq_len=16), seed=0)
    stream.next_rows(1)
    assert stream.position().source["pass"] > 2
    assert capsys.readouterr().out == ""


def test_the_end_of_a_run_does_not_wait_for_a_source_that_waits(corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(prefetch, "CLOSE_SECONDS", 0.2)
    source, gone_on = open_files(corpus), threading.Event()

    def waiting() -> Iterator[TextChunk]:
        gone_on.wait(60)
        yield TextChunk("too late", True, False)

    source.chunks = waiting
    batches = Prefetcher(TokenStream(source, tokenizer, DataConfig(seq_len=32), seed=0), 1)
    asked = time.monotonic()
    batches.close()
    assert time.monotonic() - asked < 5
    gone_on.set()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["once upon a time " * 300_000, "x" * 5_000_000, "ab1-" * 1_250_000])
def test_a_document_of_five_megabytes_becomes_rows_in_seconds(text, tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in ("a", "b", text, "c")))
    stream = TokenStream(open_files(tmp_path), tokenizer, DataConfig(seq_len=256), seed=0)
    asked = time.monotonic()
    for _ in range(200):
        stream.next_rows(8)
        stream.position()
    assert time.monotonic() - asked < 60


def test_empty_files_among_the_standard_library_s_are_passed_over(tmp_path):
    """Its packages have empty `__init__.py`."""
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "b.py").write_text("")
    source = FileSource(stdlib_files(tmp_path), DataConfig(), 0)
    assert [chunk.text for chunk in source.chunks()] == ["a = 1\n"]
