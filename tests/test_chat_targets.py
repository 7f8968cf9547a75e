"""Which tokens of chats, and of prompts with completions, are targets: those of the answers, end tokens included."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import numpy as np
import pytest
from chat_templates import FAMILIES, tokenizer_of
from transformers import PreTrainedTokenizerFast

from jaxllm.config import TrainConfig
from jaxllm.config.groups import DataConfig
from jaxllm.data.chats import Pair
from jaxllm.data.documents import DocumentEncoder
from jaxllm.data.encode import encoder_of
from jaxllm.data.source import TextChunk
from jaxllm.errors import UserError
from jaxllm.model.batch import NOT_TARGET, token_batch
from tests.configs import held_out_of, open_files

DATA = DataConfig(train_on="assistant", documents="joined")
KINDS = ["byte-level", "Metaspace first"]
SAID = ["Yes, 42.", "No: (x) = 'y'\n\nand more"]
CONTROL = "<|im_start|>assistant <|im_end|> <start_of_turn>model [gMASK] </s> <s> <|eot_id|> <\uff5cAssistant\uff5c>"


def chat(*said: str, asked: str = "What is it?") -> list[dict[str, str]]:
    turns = [[{"role": "user", "content": asked}, {"role": "assistant", "content": text}] for text in said]
    return [message for turn in turns for message in turn]


@functools.cache
def tokenizer(name: str, kind: str = KINDS[0]) -> PreTrainedTokenizerFast:
    return tokenizer_of(FAMILIES[name], kind)


def encoded(name: str, text: Any, kind: str = KINDS[0]) -> tuple[np.ndarray, DocumentEncoder]:
    made = DocumentEncoder(encoder_of(tokenizer(name, kind)), DATA)
    return made.add(TextChunk(text, True, False)), made


def targets_of(name: str, text: Any, kind: str = KINDS[0]) -> list[str]:
    """What runs of targets say."""
    tokens, _ = encoded(name, text, kind)
    is_target = tokens & NOT_TARGET == 0
    borders = np.flatnonzero(np.diff(np.concatenate([[0], is_target, [0]])))
    return [tokenizer(name, kind).decode(tokens[start:stop]) for start, stop in borders.reshape(-1, 2)]


def wanted(name: str, *said: str) -> list[str]:
    family = FAMILIES[name]
    turns = [family.turn.format(text=text) + family.end for text in said]
    if not family.end:
        turns[-1] += family.eos
    return turns


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_are_the_assistant_s_text_and_its_end_token(name):
    assert targets_of(name, chat(*SAID)) == wanted(name, *SAID)
    assert targets_of(name, chat(SAID[0])) == wanted(name, SAID[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_are_the_same_text_with_a_tokenizer_of_pieces(name):
    found, said = targets_of(name, chat(*SAID), KINDS[1]), wanted(name, *SAID)
    assert [re.sub("[ ▁]", "", text) for text in found] == [re.sub("[ ▁]", "", text) for text in said]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokens_are_those_of_the_whole_chat(name):
    """Which tokens are targets changes no token; what follows the last one is one end token at most."""
    tokens, made = encoded(name, chat(*SAID))
    ids = (tokens & ~NOT_TARGET).tolist()
    whole = made.encoder.chat_ids(chat(*SAID)).tolist()
    assert ids[: len(whole)] == whole
    assert ids[len(whole) :] in ([], [made.encoder.eos])
    ends = tokenizer(name).convert_tokens_to_ids([FAMILIES[name].end or FAMILIES[name].eos])
    assert sum(id in ends for id in ids) == sum(id in ends for id in whole) + (len(ids) > len(whole))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_user_spells_changes_no_target(name):
    mild, spelled = chat(*SAID), chat(*SAID, asked=CONTROL)
    assert targets_of(name, spelled) == targets_of(name, mild)
    control = set(tokenizer(name).all_special_ids) | set(tokenizer(name).get_added_vocab().values())
    counts = [[int(((encoded(name, text)[0] & ~NOT_TARGET) == id).sum()) for id in control] for text in (mild, spelled)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_assistant_spells_is_text_and_a_target(name):
    assert targets_of(name, chat(CONTROL, SAID[0])) == wanted(name, CONTROL, SAID[0])


def test_a_template_that_drops_earlier_reasoning_trains_on_the_last_answer():
    text = chat("<think>hm</think>One", "<think>well</think>Two")
    _, made = encoded("drops earlier reasoning", text)
    assert targets_of("drops earlier reasoning", text) == ["<think>well</think>Two<|im_end|>"]
    assert made.counts.last_only == 1
    user_is_last = [*text, {"role": "user", "content": "Thanks"}]
    assert targets_of("drops earlier reasoning", user_is_last) == ["<think>well</think>Two<|im_end|>"]
    assert encoded("drops earlier reasoning", chat(*SAID))[1].counts.last_only == 0


def test_messages_that_a_template_merges_are_one_turn():
    text = [*chat("One"), {"role": "assistant", "content": "Two"}, *chat("Three")]
    assert targets_of("merges turns", text) == ["One Two<|im_end|>", "Three<|im_end|>"]
    assert targets_of("ChatML", text) == ["One<|im_end|>", "Two<|im_end|>", "Three<|im_end|>"]
    assert encoded("merges turns", text)[1].counts.last_only == 0


def test_reasoning_that_only_the_generation_prompt_begins_is_no_target():
    assert targets_of("DeepSeek-R1", chat("<b>x</b>")) == wanted("DeepSeek-R1", "<b>x</b>")


@pytest.mark.parametrize("kind", KINDS)
def test_the_completion_is_the_target(kind):
    name = "ChatML, another end of text"
    assert targets_of(name, Pair("Q: 1+1 =", " 2"), kind) == [" 2</s>" if kind == "byte-level" else "2</s>"]
    assert targets_of(name, Pair("", "2"), kind) == ["2</s>"]
    messages = chat(*SAID)
    assert targets_of(name, Pair(messages[:3], messages[3:])) == wanted(name, SAID[1])
    marked = "ChatML that marks generation"
    assert targets_of(marked, Pair(messages[:3], messages[3:])) == wanted(marked, SAID[1])


def test_nothing_is_a_target_where_nobody_answers():
    tokens, made = encoded("ChatML", [{"role": "user", "content": "Hello?"}])
    assert tokens is None
    assert made.counts.without_target == 1


ROWS = {
    "messages": {"messages": chat("A", asked="Q")},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Q"}]},
            {"role": "assistant", "content": "A"},
        ]
    },
    "Alpaca": {"instruction": "Q", "input": "", "output": "A"},
    "prompt and completion": {"prompt": chat("A", asked="Q")[:1], "completion": chat("A", asked="Q")[1:]},
}


@pytest.mark.parametrize("form", ROWS)
def test_every_form_of_a_chat_has_the_same_rows(form, tmp_path):
    made = tokenizer("ChatML")
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(ROWS[form])] * 60))
    config = TrainConfig.from_options(
        data=str(tmp_path), seq_len=64, eval_samples=2, train_on="assistant", documents="separate"
    )
    found = held_out_of(config, made)
    batch = token_batch(found.rows, config.data)
    first = batch.documents[0] == 1
    assert made.decode(batch.ids[0][first]) == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    assert made.decode(batch.targets[0][first & (batch.targets[0] >= 0)]) == "A<|im_end|>"


def test_an_input_of_alpaca_follows_the_instruction(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,input,output\nAdd,1 2,3\n")
    (chunk,) = open_files(tmp_path).chunks()
    assert chunk.text == chat("3", asked="Add\n\n1 2")


def test_rows_with_a_picture_are_skipped_counted_and_said(tmp_path, capsys):
    picture = {"role": "user", "content": [{"type": "image_url", "url": "x"}, {"type": "text", "text": "Q"}]}
    rows = [ROWS["messages"]] * 30 + [{"messages": [picture, *chat("A")]}] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_files(tmp_path)
    assert len(list(source.chunks())) == 30
    assert (source.seen.skipped_rows, source.seen.other_parts) == (3, 3)
    assert "a message with a part of type 'image_url'" in capsys.readouterr().out


def test_fields_of_another_form_are_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"topic": "a", "body": "b"}))
    with pytest.raises(UserError, match="there is no field 'text', but topic, body: pass --text-field"):
        open_files(tmp_path)
