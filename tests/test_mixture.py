"""Several sources with weights: shares of the text, exact positions, and names with any characters."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from chat_templates import FAMILIES, tokenizer_of

import train
from jaxllm.config import TrainConfig
from jaxllm.config.groups import DataConfig
from jaxllm.data import stream as streams
from jaxllm.data.mixture import weighted
from jaxllm.data.source import Shard
from jaxllm.data.sources import open_source
from jaxllm.data.stream import TokenStream
from jaxllm.data.tokenizer import train_tokenizer
from jaxllm.errors import UserError
from jaxllm.store.metrics_file import read_metrics
from tests.configs import held_out_of, open_files

WEIGHTED = {
    "a=0.7,b=0.3": {"a": 0.7, "b": 0.3},
    "a=1,b=2,c/d=1e-3": {"a": 1.0, "b": 2.0, "c/d": 1e-3},
    "my,data=3,x=y=2": {"my,data": 3.0, "x=y": 2.0},
    "a,b": {},
    "a=1": {},
    "lang=en": {},
    "a=1,b": {},
    "a=1,b=x": {},
}


@pytest.mark.parametrize("data", WEIGHTED)
def test_weights_end_each_name(data):
    assert weighted(data) == WEIGHTED[data]


@pytest.mark.parametrize(("data", "said"), [("a=0,b=1", "weight of 'a'"), ("a=1,a=2", "'a' occurs twice")])
def test_weights_that_cannot_be_meant_are_refused(data, said):
    with pytest.raises(UserError, match=said):
        weighted(data)


def test_a_path_that_looks_like_weights_is_a_path(tmp_path):
    folder = tmp_path / "a=1,b=2"
    folder.mkdir()
    (folder / "x.txt").write_text("words")
    assert [chunk.text for chunk in open_files(folder).chunks()] == ["words"]
    with pytest.raises(UserError, match="several sources need weights"):
        open_source(TrainConfig.from_options(data="one,two").data, 0)


@pytest.fixture
def mixed(tmp_path) -> str:
    """A large source of short texts, a small one of long texts, and a text file; the second is read several times."""
    draw = random.Random(0)
    for name, files, rows, words in (("large", 3, 400, 5), ("small", 2, 30, 60)):
        (tmp_path / name).mkdir()
        for i in range(files):
            lines = [{"text": f"{name} {i} {j} " + "w " * draw.randint(1, words)} for j in range(rows)]
            lines.insert(3, {"text": None})
            (tmp_path / name / f"{i}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "doc.txt").write_text("".join(f"doc line {i}\n" for i in range(2000)))
    return f"{tmp_path / 'large'}=5,{tmp_path / 'small'}=3,{tmp_path / 'doc.txt'}=2"


def test_each_source_gives_its_share_of_the_text(mixed):
    source = open_source(TrainConfig.from_options(data=mixed).data, 0)
    given, whole = Counter(), 0
    for _ in range(4):
        for chunk in source.chunks():
            if not chunk.held_out:
                given[chunk.text.split()[0]] += len(chunk.text)
    whole = sum(given.values())
    for name, share in (("large", 0.5), ("small", 0.3), ("doc", 0.2)):
        assert given[name] / whole == pytest.approx(share, abs=0.02)
    assert source.position["pass"] == 4


def test_a_document_in_chunks_stays_together_and_the_position_is_exact(mixed):
    def fresh():
        return open_source(TrainConfig.from_options(data=mixed).data, 0)

    source, chunks, positions = fresh(), [], []
    for _ in range(2):
        for chunk in source.chunks():
            chunks.append(chunk)
            positions.append(json.dumps(source.position))
    for one, two in itertools.pairwise(chunks):
        assert one.ends_document or two.text.startswith("doc") or not one.text.startswith("doc")
    for at in range(0, len(chunks) - 1, len(chunks) // 9):
        resumed = fresh()
        resumed.position = json.loads(positions[at])
        rest = itertools.chain.from_iterable(resumed.chunks() for _ in range(2))
        wanted = chunks[at + 1 : at + 400]
        assert [*itertools.islice(rest, len(wanted))] == wanted


def test_rows_continue_exactly(mixed, monkeypatch):
    monkeypatch.setattr(streams, "POOL_ROWS", 16)
    config = TrainConfig.from_options(data=mixed, seq_len=32, eval_samples=9)
    tokenizer = train_tokenizer(open_source(config.data, config.seed), 300)
    stream = TokenStream(open_source(config.data, config.seed), tokenizer, DataConfig(seq_len=32), seed=1)
    wanted = [stream.next_rows(5) for _ in range(60)]
    resumed = TokenStream(open_source(config.data, config.seed), tokenizer, DataConfig(seq_len=32), seed=1)
    for i in range(60):
        if i % 7 == 6:
            position = resumed.position()
            resumed = TokenStream(open_source(config.data, config.seed), tokenizer, DataConfig(seq_len=32), seed=1)
            resumed.seek(position)
        np.testing.assert_array_equal(resumed.next_rows(5), wanted[i])
    assert resumed.skipped_rows == stream.skipped_rows > 0
    text = tokenizer.decode(held_out_of(config, tokenizer).rows.reshape(-1))
    assert all(name in text for name in ("large", "small", "doc"))


def test_a_chat_that_is_skipped_is_counted_once_however_often_its_source_repeats(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "POOL_ROWS", 4)
    turns = [{"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer."}]
    for name, chats in (("large", [turns] * 200), ("small", [*[turns] * 4, turns[:1]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    sources = f"{tmp_path / 'large.jsonl'}=1,{tmp_path / 'small.jsonl'}=1"
    data = DataConfig(sources, train_on="assistant", documents="joined", seq_len=32)
    stream = TokenStream(open_source(data, 0), tokenizer_of(FAMILIES["ChatML"], "byte-level"), data, seed=1)
    stream.next_rows(100)
    passes = [part["pass"] for part in stream.position().source["sources"]]
    assert (passes[0], passes[1] > 3, stream.skipped_rows) == (0, True, 1)


def test_other_data_in_one_source_is_refused(mixed, tmp_path):
    config = TrainConfig.from_options(data=mixed)
    position = open_source(config.data, config.seed).position
    (tmp_path / "small" / "1.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(UserError, match=r"'1\.jsonl' has another content"):
        open_source(config.data, config.seed).position = position
    other = config.with_options(data=mixed.replace("=5,", "=6,"))
    with pytest.raises(UserError, match=r"shares 0.5, 0.3, 0.2 of the text, not 0.54.*pass the old weights"):
        open_source(other.data, 0).position = position
    one = config.with_options(data=str(tmp_path / "large"))
    with pytest.raises(UserError, match="other data"):
        open_source(one.data, 0).position = position


def test_files_of_one_source_are_left_out_by_its_name(mixed, tmp_path):
    def texts(**options) -> str:
        source = open_source(TrainConfig.from_options(data=mixed, **options).data, 0)
        return " ".join(chunk.text for chunk in source.chunks())

    assert "small 1 " in texts()
    assert "small 1 " not in texts(skip_data=f"{tmp_path / 'small'}/1.jsonl")
    with pytest.raises(UserError, match=r"skip_data is '1\.jsonl': of several sources"):
        texts(skip_data="1.jsonl")


@pytest.mark.slow
def test_a_run_on_a_mixture_resumes(narrow_model, mixed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(streams, "POOL_ROWS", 16)
    run = tmp_path / "runs" / "mixed"
    options = ["--data", mixed, "--run-dir", str(run), "--steps", "6", "--save-every", "3", "--sample-tokens", "0"]
    assert train.main([*narrow_model, *options]) == 0
    assert capsys.readouterr().out.count(" files (") == 3
    before = [(record["step"], record["loss"], record["grad_norm"]) for record in read_metrics(run) if "loss" in record]
    shutil.rmtree(run / "checkpoints" / "6")  # as if it had been killed
    assert train.main(["--run-dir", str(run)]) == 0
    after = [(record["step"], record["loss"], record["grad_norm"]) for record in read_metrics(run) if "loss" in record]
    assert after == before


def test_a_source_that_gives_nothing_is_named(tmp_path):
    Path(tmp_path / "a.txt").write_text("words\n" * 100)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("x", "held out")))
    config = TrainConfig.from_options(data=f"{tmp_path / 'a.txt'}=1,{tmp_path / 'b.jsonl'}=1")
    source = open_source(config.data, config.seed)
    for part in source.parts:
        part.chunks = lambda chunks=part.chunks: (chunk._replace(held_out=True) for chunk in chunks())
    with pytest.raises(UserError, match="has nothing to train on: leave it out"):
        list(itertools.chain.from_iterable(source.chunks() for _ in range(5)))


def test_a_turn_ends_with_the_part_of_a_document_that_the_shard_has(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.txt").write_text(f"{name}{i}\n" * 20_000)
    data = f"{tmp_path / 'a'}=1,{tmp_path / 'b'}=1"
    for shard in range(2):
        chunks = [*open_source(DataConfig(source=data), 0, Shard(shard, 2)).chunks()]
        document: set[str] = set()
        for chunk in chunks:
            document |= {line for line in chunk.text.split() if len(line) == 2}
            assert len(document) <= 1
            if chunk.ends_document:
                document = set()


def test_a_source_without_the_split_to_evaluate_is_named(mixed):
    source = open_source(TrainConfig.from_options(data=mixed, eval_data="nosuch").data, 0)
    with pytest.raises(UserError, match=r"^eval_data is 'nosuch': data is '.*large'"):
        source.held_out()
