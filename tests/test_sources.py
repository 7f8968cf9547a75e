"""Corners of the sources: few files, broken text, the end of a pass, progress within a file."""

from __future__ import annotations

import numpy as np
import pytest

from jaxllm.data.corpus import FileSource, local_files
from jaxllm.data.stream import Prefetcher, TokenStream
from jaxllm.data.tokenizer import train_tokenizer
from jaxllm.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(FileSource(local_files(corpus), 0, "text"), 300)


def test_a_few_small_files_leave_something_to_evaluate_on(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"file {i}\n")
    pieces = list(FileSource(local_files(tmp_path), 0, "text").pieces())
    assert [piece.held_out for piece in pieces].count(True) == 1


def test_half_a_surrogate_pair_is_replaced(tmp_path, tokenizer):
    (tmp_path / "data.jsonl").write_text('{"text": "a\\ud800b"}\n')
    (piece,) = FileSource(local_files(tmp_path), 0, "text").pieces()
    assert tokenizer.decode(tokenizer(piece.text)["input_ids"]) == "a?b"


def test_progress_grows_within_a_file(tmp_path):
    (tmp_path / "one.txt").write_text("line é\n" * 4000)
    source = FileSource(local_files(tmp_path), 0, "text")
    seen = [source.progress() for _ in source.pieces()]
    assert seen == sorted(set(seen))
    assert seen[-1] == pytest.approx(1.0)
    assert source.progress() == 1.0


def test_a_stream_goes_on_from_the_very_end_of_a_pass(corpus, tokenizer):
    def fresh():
        return TokenStream(FileSource(local_files(corpus), 0, "text"), tokenizer, 32, seed=0)

    at_the_end, from_the_start = fresh(), fresh()
    files = len(local_files(corpus))
    source = at_the_end.position().source | {"pass": 1, "file": files}
    at_the_end.seek(at_the_end.position()._replace(source=source))
    from_the_start.seek(from_the_start.position()._replace(source=source | {"pass": 2, "file": 0}))
    np.testing.assert_array_equal(at_the_end.next_rows(4), from_the_start.next_rows(4))


def test_held_out_text_alone_is_refused(corpus, tokenizer):
    source = FileSource(local_files(corpus), 0, "text")
    source.pieces = lambda pieces=source.pieces: (piece._replace(held_out=True) for piece in pieces())
    with pytest.raises(UserError, match="nothing is left to train on"):
        TokenStream(source, tokenizer, 32, 0).next_rows(1)


def test_a_prefetcher_raises_its_error_each_time(corpus, tokenizer):
    """A second call must not wait for a thread that has ended."""
    source = FileSource(local_files(corpus), 0, "text")
    source.pieces = lambda: (_ for _ in ()).throw(UserError("data: gone"))
    batches = Prefetcher(TokenStream(source, tokenizer, 32, 0), 1)
    for _ in range(2):
        with pytest.raises(UserError, match="data: gone"):
            next(batches)
    batches.close()
