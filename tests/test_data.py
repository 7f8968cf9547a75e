"""Documents in, rows out: exact packing, a held-out part that stays out, and positions that continue exactly."""

from __future__ import annotations

import dataclasses
import json
import sysconfig
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import PRESETS, TrainConfig, recipe
from jaxllm.config.groups import DataConfig
from jaxllm.data import hub_source
from jaxllm.data import stream as streams
from jaxllm.data.hub_source import HubSource
from jaxllm.data.prefetch import Prefetcher
from jaxllm.data.reading import CHUNK_CHARS
from jaxllm.data.sources import open_source, stdlib_files
from jaxllm.data.stream import TokenStream
from jaxllm.data.tokenizer import align, train_tokenizer
from jaxllm.errors import UserError
from tests.configs import encode, held_out_of, open_files

TEXTS = [f"document {i}: " + "some words of text " * (1 + i % 7) for i in range(90)]


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(open_files(corpus), 300)


@pytest.fixture(autouse=True)
def _small_pool(monkeypatch):
    monkeypatch.setattr(streams, "POOL_ROWS", 16)


@pytest.fixture(params=["text folder", "jsonl", "parquet", "hub"])
def source(request, tmp_path, monkeypatch):
    """A function that opens a fresh source of each kind."""
    rows = [{"text": text} for text in TEXTS]
    if request.param == "text folder":
        for i, text in enumerate(TEXTS[:30]):
            (tmp_path / f"{i}.txt").write_text(text)
        return lambda: open_files(tmp_path)
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if request.param == "hub":
        real = datasets.load_dataset

        def local(name, config, split, streaming, revision, cache_dir):
            return real("json", data_files=str(jsonl), split=split, streaming=streaming)

        monkeypatch.setattr(datasets, "load_dataset", local)
        monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)  # it asks a host of the network
        monkeypatch.setattr(hub_source, "hub_reachable", lambda: True)
        monkeypatch.setattr(HubSource, "_newest_revision", lambda source: "0" * 40)
        return lambda: HubSource(DataConfig(source="some/corpus"))
    if request.param == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet", row_group_size=20)
        return lambda: open_files(tmp_path / "b.parquet")
    return lambda: open_files(jsonl)


def test_positions_continue_exactly_again_and_again(source, tokenizer):
    """Across several passes, and from positions of streams that were resumed themselves."""
    stream = TokenStream(source(), tokenizer, DataConfig(seq_len=32), seed=3)
    wanted = [stream.next_rows(9) for _ in range(80)]
    assert stream.position().source["pass"] >= 2
    resumed = TokenStream(source(), tokenizer, DataConfig(seq_len=32), seed=3)
    for i in range(80):
        if i % 7 == 6:
            position = resumed.position()
            resumed = TokenStream(source(), tokenizer, DataConfig(seq_len=32), seed=3)
            resumed.seek(position)
        np.testing.assert_array_equal(resumed.next_rows(9), wanted[i])


def test_a_position_does_not_move_with_its_stream(source, tokenizer):
    stream = TokenStream(source(), tokenizer, DataConfig(seq_len=32), seed=0)
    stream.next_rows(3)
    position = stream.position()
    kept = json.dumps(position.source)
    stream.next_rows(50)
    assert json.dumps(position.source) == kept


def test_packing_loses_and_repeats_nothing(source, tokenizer):
    """The rows in the order in which they are packed are the documents, each with its end."""
    stream = TokenStream(source(), tokenizer, DataConfig(seq_len=32), seed=0)
    packed = np.concatenate([next(stream._rows)[0] for _ in range(30)])
    chunks = [chunk for chunk in source().chunks() if not chunk.held_out]
    tokens = np.concatenate([encode(tokenizer, chunk.text, chunk.ends_document) for chunk in chunks])
    length = min(len(packed), len(tokens))
    np.testing.assert_array_equal(packed[:length], tokens[:length])
    assert (tokens == tokenizer.eos_token_id).sum() == sum(chunk.ends_document for chunk in chunks)


def test_the_held_out_part_is_never_trained_on(source):
    chunks = list(source().chunks())
    held_out = {chunk.text for chunk in chunks if chunk.held_out}
    assert 0 < len(held_out) < 0.1 * len(chunks)
    opened = source()
    again = [chunk for _ in range(2) for chunk in opened.chunks()]  # a second pass holds out the same
    assert {chunk.text for chunk in again if chunk.held_out} == held_out


def test_rows_without_text_are_skipped_and_counted(tmp_path):
    file = tmp_path / "a.jsonl"
    good = [json.dumps({"text": f"row {i}"}) for i in range(5)]
    file.write_text("\n".join([*good, '{"text": 5}', '{"other": "x"}', "{broken", '{"text": ""}', "[1]", ""]))
    source = open_files(file)
    assert [chunk.text for chunk in source.chunks()] == [f"row {i}" for i in range(5)]
    assert source.position["skipped"] == 5


def test_a_long_line_comes_in_bounded_chunks(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("word " * 10_000)
    chunks = list(open_files(file).chunks())
    assert max(len(chunk.text) for chunk in chunks) <= CHUNK_CHARS
    assert "".join(chunk.text for chunk in chunks) == "word " * 10_000
    assert [chunk.ends_document for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_prefetching_gives_the_stream_s_batches_positions_and_errors(corpus, tokenizer):
    def open_stream():
        return TokenStream(open_files(corpus), tokenizer, DataConfig(seq_len=32), seed=1)

    plain, ahead = open_stream(), Prefetcher(open_stream(), 4)
    for _ in range(10):
        batch = ahead.take()
        np.testing.assert_array_equal(batch.rows, plain.next_rows(4))
        assert batch.position.drawn == plain.position().drawn
        assert batch.position.source == plain.position().source
    ahead.close()

    broken = open_stream()
    broken.next_rows = lambda count: (_ for _ in ()).throw(UserError("the disk is gone"))
    with pytest.raises(UserError, match="the disk is gone"):
        Prefetcher(broken, 4).take()


def test_the_standard_library_is_a_corpus_without_tests():
    files = stdlib_files(Path(sysconfig.get_path("stdlib"))).files.values()
    assert sum(file.stat().st_size for file in files) > 5e6
    assert not [file for file in files if {"test", "tests", "site-packages"} & set(file.parts[-3:-1])]


def test_the_tokenizer_trains_deterministically(corpus, tokenizer):
    again = train_tokenizer(open_files(corpus), 300)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == 300


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_config_and_tokenizer_are_aligned(tokenizer):
    aligned = align(TrainConfig(), tokenizer).model
    end = tokenizer.eos_token_id
    special = (aligned.bos_token_id, aligned.eos_token_id, aligned.pad_token_id)
    assert (aligned.vocab_size, *special) == (300, end, end, tokenizer.pad_token_id)
    assert tokenizer.pad_token_id != end
    seed = align(recipe("seed", "customllm-768"), tokenizer).model
    assert seed.vocab_size == PRESETS["customllm-768"].vocab_size  # a published shape stays as it is


def test_a_vocabulary_that_does_not_fit_is_refused(tokenizer):
    narrow = dataclasses.replace(PRESETS["tiny"], vocab_size=299)
    with pytest.raises(UserError, match=r"vocab_size is 299.*300 tokens.*--model.vocab-size 300"):
        align(TrainConfig.from_options(model=narrow), tokenizer)


def test_the_49152_token_tokenizer_fits_the_source_s_presets():
    folder = Path(__file__).parents[2] / "shared" / "tokenizer"
    if not folder.is_dir():
        pytest.skip("the 49,152-token test tokenizer is not beside this checkout")
    from jaxllm.data.tokenizer import load_tokenizer

    big = load_tokenizer(str(folder))
    assert align(recipe("seed", "customllm-1b"), big).model.eos_token_id == 0
    assert align(TrainConfig(), big).model.vocab_size == 49152


def test_evaluation_rows_come_from_the_held_out_part(corpus, tokenizer):
    config = TrainConfig.from_options(data=str(corpus), seq_len=32, eval_samples=5)
    rows = held_out_of(config, tokenizer).rows
    assert rows.shape == (5, 32)
    text = "".join(chunk.text for chunk in open_source(config.data, config.seed).chunks() if chunk.held_out)
    assert tokenizer.decode(rows[0]) in text
    other = held_out_of(config.with_options(seed=7), tokenizer).rows
    np.testing.assert_array_equal(rows, other)  # runs with different seeds can be compared
