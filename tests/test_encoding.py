"""Special tokens that a text spells are text, and a document's pieces have the tokens of the whole."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import re
from collections.abc import Iterator

import numpy as np
import pytest
from encoding_kinds import CODE, CORPUS, KINDS, TEMPLATES, tokenizer_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxllm.config import TrainConfig
from jaxllm.config.groups import DataConfig
from jaxllm.data import documents
from jaxllm.data.documents import DocumentEncoder
from jaxllm.data.encode import MARK, encoder_of
from jaxllm.data.epochs import steps_for_epochs
from jaxllm.data.lines import Lines
from jaxllm.data.reading import _text_chunks
from jaxllm.data.source import Shard, TextChunk
from jaxllm.data.sources import open_source
from jaxllm.data.stream import POOL_ROWS, Position, ProcessBatches, TokenStream
from jaxllm.data.tokenizer import bytes_per_target, encode_prompt, text_bytes, without_dropout
from jaxllm.errors import UserError
from jaxllm.run import prepare
from jaxllm.run.arguments import parse_args
from jaxllm.store.lock import FolderLock
from tests.configs import encode, held_out_of

CHAT = [{"role": "user", "content": "Hello 1"}, {"role": "assistant", "content": "Hello 2"}]


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> PreTrainedTokenizerFast:
    return tokenizer_of(request.param)


def texts(length: int) -> Iterator[str]:
    draw = random.Random(0).choice
    for source in ((CODE + CORPUS[1] + CORPUS[2]) * (1 + length // 30_000), "a" * length, " " * (length - 1) + "x"):
        yield source[:length]
    for letters in ("abcXYZ0189+/", "東京都は日本の首都です。、什么你好", ["😀", "👩‍👩‍👧", " ", "\n"]):
        yield "".join(draw(letters) for _ in range(length))
    mixed = [" ", "\n", "\t", "x", "foo", "it's", "12345", " " * 300, "e\u0301", "<s>", "</s>", "\uff1cs\uff1e"]
    mixed += [MARK, MARK[0]]
    yield "".join(draw(mixed) for _ in range(length))[:length]


def in_pieces(encoder: DocumentEncoder, text: str) -> np.ndarray:
    """A document as a file of text is read."""
    pieces = [chunk.text for chunk in _text_chunks(Lines(io.BytesIO(text.encode())), lambda offset: offset)]
    assert "".join(pieces) == text
    chunks = [TextChunk(piece, i == len(pieces) - 1, False, part=i) for i, piece in enumerate(pieces)]
    return np.concatenate([encoder.add(chunk) for chunk in chunks])


@pytest.mark.parametrize("length", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4096)), 4097, 13_000])
def test_pieces_have_the_tokens_of_the_whole(kind, length):
    encoder = encoder_of(kind)
    for text in texts(length):
        np.testing.assert_array_equal(in_pieces(DocumentEncoder(encoder), text), encoder.with_end(encoder.ids(text)))


@pytest.mark.slow
def test_pieces_of_a_long_document_have_the_tokens_of_the_whole(kind):
    encoder = encoder_of(kind)
    for text in texts(1_000_000):
        np.testing.assert_array_equal(in_pieces(DocumentEncoder(encoder), text), encoder.with_end(encoder.ids(text)))


def test_indentation_stays_at_a_cut():
    """As the library encodes the whole file; a Llama-2 tokenizer added a space at each cut."""
    text = "def f():\n" + "    return 1\n" * 2000
    for kind in ("Llama-2", "Metaspace first", "byte-level"):
        tokenizer = tokenizer_of(kind)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert in_pieces(DocumentEncoder(encoder_of(tokenizer)), text)[:-1].tolist() == whole


def test_a_missing_piece_does_not_begin_the_next_one_anew(kind):
    """Held out or of another shard: nothing that begins a text comes before the next piece."""
    encoder = encoder_of(kind)
    pieces = ["x = 1\n" * 200, "y = 2\n" * 200, "    z = 3\n" * 200]
    made = DocumentEncoder(encoder)
    found = [made.add(TextChunk(pieces[i], i == 2, False, part=i)) for i in (0, 2)]
    first, rest = encoder.ids(pieces[0]), encoder.ids("a" + pieces[2])[len(encoder.ids("a")) :]
    np.testing.assert_array_equal(np.concatenate(found), encoder.with_end(np.concatenate([first, rest])))


def test_a_document_that_is_never_ended_is_encoded_before_the_next(kind):
    made = DocumentEncoder(encoder_of(kind))
    found = [made.add(TextChunk("x = 1\n" * 100, False, False)), made.add(TextChunk("Hello 1", True, False))]
    wanted = [encode(kind, "x = 1\n" * 100, True), encode(kind, "Hello 1", True)]
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(wanted))


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_each_document_of_a_shard_ends_whatever_is_held_out(shards, tmp_path):
    for i in range(25):
        (tmp_path / f"{i:02}.txt").write_text(f"line of {i} here\n" * 1400)
    tokenizer = tokenizer_of("byte-level")
    config = TrainConfig.from_options(data=str(tmp_path), hold_out="chunks")
    for held_out in (False, True):
        for shard in range(shards):
            source = open_source(config.data, config.seed, Shard(shard, shards))
            read = source.held_out() if held_out else source.chunks()
            chunks = [chunk for chunk in read if chunk.held_out == held_out]
            ids = np.concatenate([*documents.encoded(DocumentEncoder(encoder_of(tokenizer)), chunks)])
            parts = tokenizer.decode(ids).split(tokenizer.eos_token)
            assert parts.pop() == ""
            numbers = [{line.split()[2] for line in part.splitlines() if line.count(" ") == 3} for part in parts]
            assert len(numbers) == len({*map(frozenset, numbers)}) > 1
            assert all(len(number) == 1 for number in numbers)


def test_a_text_without_a_place_to_cut_is_cut_in_the_end(monkeypatch):
    monkeypatch.setattr(documents, "MAX_PENDING", 10_000)
    tokenizer = tokenizer_of("byte-level")
    made = DocumentEncoder(encoder_of(tokenizer))
    ids = np.concatenate([made.add(TextChunk("a" * 4096, i == 9, False, part=i)) for i in range(10)])
    assert tokenizer.decode(ids[:-1]) == "a" * 40_960
    assert len(made.state[0]) == 0


@pytest.mark.parametrize("name", KINDS)
def test_what_a_message_or_a_text_spells_is_no_control_token(name):
    for template, (_, special, plain) in TEMPLATES.items():
        tokenizer = tokenizer_of(name, template)
        control = [*special, *(text for text in plain if "think" not in text), "<s>", "</s>"]
        ids = {tokenizer.convert_tokens_to_ids(text) for text in control}
        hostile = f" {' '.join(control)} {''.join(control)}{control[0]} x"
        chat = [message | {"content": message["content"] + hostile + message["content"]} for message in CHAT]
        mild, found = encode(tokenizer, CHAT, True).tolist(), encode(tokenizer, chat, True).tolist()
        assert [id for id in found if id in ids] == [id for id in mild if id in ids], template
        rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
        as_usual = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert mild[: len(as_usual)] == as_usual, template
        for text in (hostile, f"{control[0]}{control[-1]}"):
            assert ids.isdisjoint(encode(tokenizer, text, False).tolist())
            assert ids.isdisjoint(encode_prompt(tokenizer, text))
            assert not ids.isdisjoint(encode_prompt(tokenizer, text, "keep"))


def test_text_that_spells_special_tokens_round_trips():
    for name in ("byte-level", "o200k", "Metaspace first", "Llama-2"):
        for template in ("ChatML", "Llama-3", "Mistral", "Phi-3"):
            tokenizer = tokenizer_of(name, template)
            text = "".join(TEMPLATES[template][1]) + "</s> <s></s>x" + MARK + MARK[0] + MARK + MARK[1] + "<s"
            assert tokenizer.decode(encode(tokenizer, text, False)) == text


def test_bytes_that_are_special_by_their_entry_stay_bytes():
    tokenizer = tokenizer_of("Metaspace never")
    usual = encode(tokenizer, "x\n😀<0x0A>\n", False).tolist()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<0x{byte:02X}>" for byte in range(256)]})
    assert encode(tokenizer, "x\n😀<0x0A>\n", False).tolist() == usual
    assert usual.count(tokenizer.convert_tokens_to_ids("<0x0A>")) <= 2


def test_only_added_tokens_that_a_template_puts_around_turns_are_control():
    """`<think>` is an added token too, and an answer's own; so are the runs of spaces of some tokenizers."""
    tokenizer = tokenizer_of("byte-level", "Qwen, thinking")
    tokenizer.add_tokens(["        "])
    for text in ("<think>", "        "):
        assert encode(tokenizer, f"x{text}y", False)[1] == tokenizer.convert_tokens_to_ids(text)
    answer = [CHAT[0], {"role": "assistant", "content": "<think>so</think>Yes"}]
    assert "so" not in tokenizer.decode(encode(tokenizer, answer, True))  # this template parses it, and leaves it out


def test_parts_of_a_message_do_not_make_a_control_token_together():
    tokenizer = tokenizer_of("byte-level", "ChatML")
    tokenizer.chat_template = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}<|im_end|>"
    for cut in range(1, len("<|im_end|>")):
        parts = [{"type": "text", "text": text} for text in ("<|im_end|>"[:cut], "<|im_end|>"[cut:], "<")]
        ids = encode(tokenizer, [{"role": "user", "content": parts}], True).tolist()
        assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
        assert tokenizer.decode(ids[:-2]) == "<|im_end|><"


def test_messages_are_text_wherever_the_template_prints_them():
    tokenizer = tokenizer_of("byte-level", "ChatML")
    tokenizer.chat_template = "{{ messages | tojson }}<|im_end|>"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    parts = [{"type": "text", "text": "<|im_end|>"}]
    chat = [{"role": "user<|im_end|>", "content": parts, "tool_calls": [{"arguments": {"<|im_end|>": "<|im_end|>"}}]}]
    ids = encode(tokenizer, chat, True).tolist()
    assert (ids.count(end), ids[-2]) == (1, end)
    assert tokenizer.decode(ids[:-2]).count("<|im_end|>") == 4


@pytest.mark.parametrize(
    ("text", "ends"),
    [("x</s>", 1), ("x</s>\n", 1), ("x</s> \n\n", 1), ("x</s>y", 2), ("x", 1), ("</s></s>", 2), ("", 1)],
)
def test_no_second_end_token_where_a_kept_text_ends_with_one(text, ends):
    tokenizer = tokenizer_of("byte-level")
    made = DocumentEncoder(encoder_of(tokenizer, "keep"))
    ids = made.add(TextChunk(text, True, False)).tolist()
    assert ids.count(tokenizer.eos_token_id) == ends
    assert (made.counts.special, made.counts.ends) == (text.count("</s>"), text.count("</s>"))
    before = DocumentEncoder(encoder_of(tokenizer, "earlier")).add(TextChunk(text, True, False)).tolist()
    assert before.count(tokenizer.eos_token_id) == text.count("</s>") + 1
    spelled = encode(tokenizer, text, True).tolist()
    assert (spelled.count(tokenizer.eos_token_id), spelled[-1]) == (1, tokenizer.eos_token_id)


@pytest.mark.parametrize("template", ["Llama-2", "Mistral", "DeepSeek", "Zephyr"])
def test_no_second_end_token_where_the_template_ends_a_turn_with_it(template):
    tokenizer = tokenizer_of("byte-level", template)
    ids = encode(tokenizer, CHAT, True).tolist()
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert ids.count(tokenizer.eos_token_id) == rendered.count("</s>") > 0


def test_what_was_encoded_is_counted():
    tokenizer = tokenizer_of("Metaspace first", "ChatML")
    made = DocumentEncoder(encoder_of(tokenizer))
    text = ("line </s> <|im_end|>\n") * 1000
    ids = in_pieces(made, text)
    chat = made.add(TextChunk([{"role": "user", "content": "</s>"}], True, False))
    counts = made.counts
    assert (counts.documents, counts.special, counts.ends, counts.unknown) == (2, 2001, 1001, 0)
    assert counts.tokens == counts.targets == len(ids) + len(chat)


def test_dropout_is_off(capsys, tmp_path):
    tokenizer = tokenizer_of("byte-level")
    tokenizer.backend_tokenizer.model.dropout = 0.5
    found = {tuple(encode_prompt(tokenizer, CODE[:500])) for _ in range(5)}
    assert len({tuple(tokenizer(CODE[:500])["input_ids"]) for _ in range(5)}) > 1  # it would be on
    assert len(found) == 1
    without_dropout(tokenizer).save_pretrained(str(tmp_path))
    assert "dropout of 0.5 is off" in capsys.readouterr().out
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["dropout"] is None


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_a_tokenizer_that_does_not_fit_is_refused_or_named(unknown, tmp_path, capsys):
    """Whether it has a token for what it lacks, or drops it."""
    letters = {letter: i for i, letter in enumerate(["<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz "])}
    made = Tokenizer(models.BPE(letters, [], unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token=unknown)
    config = TrainConfig.from_options(data=str(tmp_path), seq_len=32)
    fits, other = "all of it are letters that fit ", "東京都は日本の首都です。"

    def rows(text: str, **options) -> None:
        for i in range(25):
            (tmp_path / f"{i:02d}.txt").write_text(text)
        held_out_of(config.with_options(**options), tokenizer)

    rows(fits * 10)
    assert capsys.readouterr().out == ""
    rows(fits * 10 + other)
    assert re.match(r"Tokenizer: 3\.\d % of the text's tokens", capsys.readouterr().out)
    with pytest.raises(UserError, match="of the text's tokens are the unknown token"):
        rows(fits * 10 + other * 20)
    rows(fits * 10 + other * 20, special_tokens_in_text="earlier")  # a run that was made before


@pytest.mark.parametrize("name", ["byte-level", "Metaspace first", "Metaspace never", "Llama-2"])
def test_bytes_are_those_of_tokens_where_rows_cut_characters(name):
    tokenizer = tokenizer_of(name)

    def size(id: int) -> int:
        piece = tokenizer.convert_ids_to_tokens(id)
        fallback = re.fullmatch("<0x..>", piece) is not None
        return len(piece) if name == "byte-level" else 1 if fallback else len(piece.replace("▁", " ").encode())

    for text in ("東京都は日本の首都です。" * 30, "😀👩‍👩‍👧🎉" * 40, "wörld ünder straße " * 20, CODE[:900]):
        ids = encode(tokenizer, text, False)
        if name in ("byte-level", "Metaspace never"):
            assert text_bytes(tokenizer, ids[None]) == len(text.encode())
        for width in (2, 3, 7, 64):
            rows = ids[: len(ids) // width * width].reshape(-1, width)
            wanted = sum(size(id) for id in rows[:, 1:].reshape(-1).tolist())
            assert bytes_per_target(tokenizer, rows) * rows[:, 1:].size == pytest.approx(wanted)
        ended = np.append(rows, np.full_like(rows[:, :1], tokenizer.eos_token_id), axis=1)
        assert text_bytes(tokenizer, ended) == text_bytes(tokenizer, rows)  # special tokens are no text


def test_rows_of_a_pass_are_drawn_before_any_of_the_next(tmp_path):
    """With fewer rows in a pass than the pool has, and across resumes."""
    tokenizer = tokenizer_of("byte-level")
    for i in range(40):
        (tmp_path / f"{i:02d}.txt").write_text(f"{i:02d}" * (10 + i))
    config = TrainConfig.from_options(data=str(tmp_path), seq_len=8, batch_size=1)

    def stream(special: str = "text") -> TokenStream:
        data = dataclasses.replace(config.data, special_tokens_in_text=special)
        return TokenStream(open_source(data, 0), tokenizer, data, seed=0)

    chunks = [chunk for chunk in open_source(config.data, 0).chunks() if not chunk.held_out]
    tokens = [token for chunk in chunks for token in encode(tokenizer, chunk.text, True)]
    rows, passes = len(tokens) // 8, 3
    assert rows * passes < POOL_ROWS
    made, drawn, done = stream(), [], []
    for step in range(rows * passes):
        if step % 50 == 49:
            position = Position.from_bytes(made.position().to_bytes(), "", 8, len(tokenizer))
            made = stream()
            made.seek(position)
        drawn.append(made.next_rows(1)[0])
        done.append(made.progress())
    whole = [len(tokens) * (number + 1) for number in range(passes)]
    for number, end in enumerate(whole):  # but for the row in which a pass ends
        these = np.concatenate(drawn[number * end // (number + 1) // 8 + number : end // 8 - 1])
        expected = np.bincount(tokens, minlength=len(tokenizer))
        assert np.abs(np.bincount(these, minlength=len(tokenizer)) - expected).sum() <= 8 * 6
    assert done[rows - 1] == pytest.approx(1, abs=0.05)
    assert done[-1] == pytest.approx(3, abs=0.05)
    mixed = stream("earlier").next_rows(rows)
    assert np.abs(np.bincount(mixed.reshape(-1), minlength=len(tokenizer)) - expected).sum() > 8 * 12


@pytest.mark.parametrize("streams", [1, 2])
def test_epochs_are_steps_of_the_largest_stream(streams, tmp_path, capsys):
    tokenizer = tokenizer_of("byte-level")
    for i in range(50):
        (tmp_path / f"{i:02d}.txt").write_text("x = 1\n" * (10 + i))
    config = TrainConfig.from_options(
        data=str(tmp_path), seq_len=8, batch_size=2, data_streams=streams, epochs=2.0, grad_accum=2
    )
    steps = steps_for_epochs(2.0, config.data, config.seed, streams, tokenizer)
    batches = ProcessBatches(config.data, config.seed, config.data_streams, tokenizer, 0, 2)
    batches.next_rows(2 * steps)
    assert batches.progress() == pytest.approx(2, abs=0.1)
    assert f"--epochs 2 is --steps {steps}" in capsys.readouterr().out
    passes = [stream.progress() for stream in batches._streams.values()]
    assert min(passes) == batches.progress()


def test_a_run_of_epochs_resumes_with_the_steps_that_it_counted(narrow_model, corpus, tmp_path, monkeypatch):
    arguments = [*narrow_model, "--data", str(corpus), "--run-dir", str(tmp_path / "run")]

    def start(*more: str) -> tuple[float | None, int]:
        config = parse_args([*arguments, *more], "train.py", None, TrainConfig)
        with FolderLock(config.folder) as lock:
            schedule = prepare.prepare(config, "JAX", lock).config.schedule
        return schedule.epochs, schedule.steps

    with pytest.raises(UserError, match="leave out one of them"):
        start("--epochs", "0.1", "--steps", "7")
    assert start("--epochs", "0.1") == (0.1, 19)
    assert start("--epochs", "0.2") == (0.2, 37)
    monkeypatch.setattr(prepare, "steps_for_epochs", None)  # it is not counted again
    assert start() == (0.2, 37)
    assert start("--epochs", "0.2") == (0.2, 37)
    assert start("--steps", "21") == (None, 21)
    assert start() == (None, 21)


def test_a_run_from_before_the_choice_resumes_with_the_same_rows(narrow_model, corpus, tmp_path):
    """Its config has no `special_tokens_in_text`, and its position no `passes` and `text`."""
    config = TrainConfig.from_options(data=str(corpus), seq_len=16, special_tokens_in_text="earlier")
    saved = config.to_dict()
    del saved["special_tokens_in_text"]
    assert TrainConfig.from_dict(saved) == config
    tokenizer, stream = tokenizer_of("Llama-2"), None
    rows = []
    for old in (False, True):
        stream = TokenStream(open_source(config.data, 0), tokenizer, config.data, seed=0)
        stream.next_rows(5)
        if old:
            position = stream.position()._replace(passes=None, text=None)
            stream = TokenStream(open_source(config.data, 0), tokenizer, config.data, seed=0)
            stream.seek(Position.from_bytes(position.to_bytes(), "", 16, len(tokenizer)))
        rows.append(stream.next_rows(200))
    np.testing.assert_array_equal(*rows)
    chunks = [chunk for chunk in open_source(config.data, config.seed).chunks() if not chunk.held_out]
    pieces = [tokenizer(chunk.text)["input_ids"] + [tokenizer.eos_token_id] * chunk.ends_document for chunk in chunks]
    packed = TokenStream(open_source(config.data, 0), tokenizer, config.data, seed=0)
    found = np.concatenate([next(packed._rows)[0] for _ in range(20)])
    assert found.tolist() == [id for piece in pieces for id in piece][: found.size]


@pytest.mark.parametrize("kind", ["Llama-2", "byte-level"])
def test_a_position_within_a_document_continues_exactly(kind, tmp_path):
    (tmp_path / "a.txt").write_text((CODE + "</s>" + "東京都 " * 300) * 5)
    config, tokenizer = TrainConfig.from_options(data=str(tmp_path), seq_len=16), tokenizer_of(kind)

    def stream() -> TokenStream:
        return TokenStream(open_source(config.data, config.seed), tokenizer, DataConfig(seq_len=16), seed=0)

    whole, made, text = stream(), stream(), []
    for _ in range(40):
        np.testing.assert_array_equal(made.next_rows(37), whole.next_rows(37))
        position = Position.from_bytes(made.position().to_bytes(), "", 16, len(tokenizer))
        text.append(position.text[0])
        made = stream()
        made.seek(position)
    assert any(text)  # some of it waited for the next piece
