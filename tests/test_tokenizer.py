"""What was trained is what is exported and printed, whatever a tokenizer adds, strips or lacks."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxllm import UserError
from jaxllm.config import RunConfig
from jaxllm.data.tokenizer import (
    PAD,
    _train,
    align,
    bytes_per_target,
    decode_after,
    encode_prompt,
    export_tokenizer,
    load_tokenizer,
    with_pad_token,
)
from jaxllm.data.tokenizer_class import check_tokenizer_class
from tests.configs import encode

TEXTS = ["the under world is under the sun", "  two spaces", "wörld 😀 under", "x"]
BOS_EOS = ["<unk>", "<s>", "</s>"]


def llama_like(template: str) -> PreTrainedTokenizerFast:
    """A space becomes a part of the next token, and the decoder strips the first."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    special = BOS_EOS + [f"<0x{i:02X}>" for i in range(256)]
    return finished(made, special, template)


def byte_level(template: str) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return finished(made, BOS_EOS, template)


def finished(made: Tokenizer, special: list[str], template: str) -> PreTrainedTokenizerFast:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(TEXTS * 20, trainer)
    if template:
        ids: list = [(name, made.token_to_id(name)) for name in ("<s>", "</s>") if name in template]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS = {
    "trained here": lambda: _train(TEXTS * 20, 300),
    "byte-level": lambda: byte_level(""),
    "byte-level with a template": lambda: byte_level("<s> $A </s>"),
    "strips a space": lambda: llama_like(""),
    "strips a space, with a template": lambda: llama_like("<s> $A"),
}


@pytest.fixture(params=KINDS)
def tokenizer(request, tmp_path):
    KINDS[request.param]().save_pretrained(str(tmp_path / "given"))
    return load_tokenizer(str(tmp_path / "given"))


@pytest.mark.parametrize("preset", ["tiny", "customllm-1b"])
def test_an_exported_tokenizer_encodes_as_in_training_and_pads_apart(tokenizer, tmp_path, preset):
    config = RunConfig.from_options(preset=preset)
    tokenizer = with_pad_token(tokenizer, config.given_vocab_size)
    model = align(config, tokenizer).model
    trained = [encode(tokenizer, text, False).tolist() for text in TEXTS]
    export_tokenizer(tokenizer, model, tmp_path / "out")
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [exported(text)["input_ids"] for text in TEXTS] == trained
    assert exported.model_max_length == model.max_position_embeddings
    assert exported.pad_token == PAD
    assert exported.pad_token_id == model.pad_token_id < model.vocab_size
    width = max(map(len, trained))
    padded = [[model.pad_token_id] * (width - len(row)) + row for row in trained]
    assert exported(TEXTS, padding=True)["input_ids"] == padded
    assert [encode(tokenizer, text, False).tolist() for text in TEXTS] == trained  # the run's own is as it was


def test_the_bytes_of_predicted_tokens_are_those_of_the_text(tokenizer):
    """Whatever the decoder strips: the first token of a row is not predicted, and special tokens are not text."""
    for text in TEXTS[:2]:
        row = encode(tokenizer, text, True)  # (T,), with the end of text
        first = tokenizer.decode(row[:1])
        wanted = len(text.strip(" ").encode()) - len(first.strip(" ").encode())
        found = bytes_per_target(tokenizer, np.asarray([row, row])) * (len(row) - 1)
        assert wanted <= round(found, 6) <= wanted + 2  # spaces at the beginning, which some decoders keep


def test_without_a_free_row_the_end_of_text_pads(tokenizer, tmp_path):
    if tokenizer.pad_token is not None:
        pytest.skip("it has its own")
    model = RunConfig.from_options(preset="customllm-1b").model
    config = RunConfig.from_options(preset="customllm-1b", model=dataclasses.replace(model, vocab_size=len(tokenizer)))
    assert len(with_pad_token(tokenizer, config.given_vocab_size)) == config.model.vocab_size
    model = align(config, tokenizer).model
    export_tokenizer(tokenizer, model, tmp_path / "out")
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported.pad_token_id == model.pad_token_id == exported.eos_token_id
    assert len({len(row) for row in exported(TEXTS, padding=True)["input_ids"]}) == 1


def test_a_continuation_is_printed_as_the_tokenizer_decodes_the_whole(tokenizer):
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for cut in range(1, len(ids)):
            prompt = tokenizer.decode(ids[:cut])
            if "\ufffd" not in prompt:  # else it ends within a character
                assert prompt + decode_after(tokenizer, ids[:cut], ids[cut:]) == tokenizer.decode(ids)
    assert decode_after(tokenizer, encode_prompt(tokenizer, ""), ids).strip() == text


CLASSES = [
    ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, "GPT2Tokenizer"),
    ({"tokenizer_class": "Qwen2TokenizerFast"}, "Qwen2Tokenizer"),
    ({"tokenizer_class": "GPT2Tokenizer"}, None),
    ({"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True}, None),
    ({}, None),
]


@pytest.mark.parametrize(("config", "other"), CLASSES)
def test_a_class_that_encodes_otherwise_than_tokenizer_json_is_refused(config, other, tmp_path):
    """Where it is not, AutoTokenizer encodes by the same files as the run."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # which Qwen2's are not: they split digits
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=letters, show_progress=False
    )
    made.train_from_iterator(["1234567 1234567 under the"] * 9, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    file = write(tmp_path / "tokenizer_config.json", config | {"eos_token": "</s>"})
    tokenizer = load_tokenizer(tmp_path)
    if other is not None:
        with pytest.raises(
            UserError, match=f"^{file}: tokenizer_class is .* would use {other}, which encodes differently from"
        ):
            check_tokenizer_class(tmp_path, tokenizer, {"model_type": "customllm"})
        return
    check_tokenizer_class(tmp_path, tokenizer, {"model_type": "customllm"})
    write(tmp_path / "config.json", {"model_type": "customllm"})
    client = AutoTokenizer.from_pretrained(tmp_path)
    assert [client(text, add_special_tokens=False)["input_ids"] for text in TEXTS] == [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS
    ]


def test_a_class_of_a_folder_s_code_is_named_and_not_run(tmp_path, capsys):
    byte_level("").save_pretrained(str(tmp_path))
    (tmp_path / "tokenization_own.py").write_text("raise SystemExit('it was run')\n")
    config = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}, "tokenizer_class": "Own"}
    file = write(tmp_path / "tokenizer_config.json", config)
    check_tokenizer_class(tmp_path, load_tokenizer(tmp_path), {"model_type": "customllm"})
    said = capsys.readouterr().out
    assert said.startswith(f"{file}: 'Own' was not compared with the vocabulary, as it does not load (")
    assert said.count("\n") == 1


def write(file, values):
    file.write_text(json.dumps(values))
    return file
