"""Ten kinds of tokenizers and ten chat templates, as they are found on the Hub."""

from __future__ import annotations

import functools
import inspect
import json
import random
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CODE = inspect.getsource(random)
CORPUS = [
    CODE,
    "Weißt du, was 東京都は日本の首都です。 emoji 😀🎉 x=" * 20,
    "it's we're I'LL don't 12345678 3.14\n\n\n   \n\t\tx" * 20,
]
SPECIAL = ["<unk>", "<s>", "</s>"]

O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def _byte_level(pre_tokenizer: Any = None, normalizer: Any = None) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL[1:], initial_alphabet=alphabet, show_progress=False),
    )
    return made


@functools.cache
def _pieces() -> tuple[dict[str, int], list[Any]]:
    """Vocabulary and merges of a SentencePiece-like BPE: no piece goes on over a space."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    special = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, limit_alphabet=100, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    model = json.loads(made.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _byte_fallback(pre_tokenizer: Any = None, normalizer: Any = None, strip: int = 1) -> Tokenizer:
    vocab, merges = _pieces()
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        made.normalizer = normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", strip, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(SPECIAL)
    return made


def _unigram(pre_tokenizer: Any) -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizer
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.decoder = decoders.Metaspace()
    return made


def _word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.decoder = decoders.WordPiece()
    return made


def _word_level() -> Tokenizer:
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=2000, special_tokens=SPECIAL, show_progress=False)
    made.train_from_iterator([*CORPUS, "Hello 1 2"], trainer)
    return made


_SPLIT, _SEQUENCE = pre_tokenizers.Split, pre_tokenizers.Sequence
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

KINDS = {
    "byte-level": _byte_level,
    "byte-level with a prefix space": lambda: _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "o200k": lambda: _byte_level(_SEQUENCE([_SPLIT(Regex(O200K), "isolated"), _BYTES])),
    "digits, NFC": lambda: _byte_level(
        _SEQUENCE([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        normalizers.NFC(),
    ),
    "Metaspace always": lambda: _byte_fallback(pre_tokenizers.Metaspace(prepend_scheme="always")),
    "Metaspace first": lambda: _byte_fallback(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "Metaspace first, no words": lambda: _byte_fallback(pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "Metaspace never": lambda: _byte_fallback(pre_tokenizers.Metaspace(prepend_scheme="never"), strip=0),
    "Llama-2": lambda: _byte_fallback(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
    "WordPiece": _word_piece,
    "Unigram": lambda: _unigram(pre_tokenizers.Metaspace()),
    "T5": lambda: _unigram(_SEQUENCE([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])),
    "WordLevel": _word_level,
}


@functools.cache
def _made(kind: str) -> str:
    return KINDS[kind]().to_str()


def tokenizer_of(kind: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer, with a chat template and its tokens."""
    made = Tokenizer.from_str(_made(kind))
    text, special, plain = TEMPLATES[template] if template else (None, [], [])
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    made.add_tokens([AddedToken(token, special=False, normalized=True) for token in plain])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = text
    return tokenizer


def _loop(body: str, start: str = "") -> str:
    return start + "{% for m in messages %}" + body + "{% endfor %}"


def _by_role(user: str, assistant: str, start: str = "") -> str:
    return _loop(f"{{% if m.role == 'user' %}}{user}{{% else %}}{assistant}{{% endif %}}", start)


_USER, _ASSISTANT, _END = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5cend▁of▁sentence\uff5c>"

TEMPLATES: dict[str, tuple[str, list[str], list[str]]] = {
    # the template, its special tokens, and those that are not special by their entry
    "ChatML": (_loop("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"), ["<|im_start|>", "<|im_end|>"], []),
    "Llama-3": (
        _loop("<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>", "<|begin|>"),
        ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        [],
    ),
    "DeepSeek": (_by_role(_USER + "{{ m.content }}", _ASSISTANT + "{{ m.content }}</s>"), [_END], [_USER, _ASSISTANT]),
    "Gemma": (
        _loop(
            "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n",
            "<s>",
        ),
        ["<start_of_turn>", "<end_of_turn>"],
        [],
    ),
    "Mistral": (_by_role("[INST] {{ m.content }} [/INST]", " {{ m.content }}</s>", "<s>"), ["[INST]", "[/INST]"], []),
    "Llama-2": (_by_role("<s>[INST] {{ m.content.strip() }} [/INST]", " {{ m.content.strip() }} </s>"), [], []),
    "Zephyr": (_loop("<|{{ m.role }}|>\n{{ m.content + eos_token }}\n"), [], ["<|user|>", "<|assistant|>"]),
    "Phi-3": (
        _loop("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n") + "<|endoftext|>",
        ["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"],
        [],
    ),
    "GLM": (
        _loop("<|{{ m.role }}|>\n{{ m.content }}", "[gMASK]<sop>"),
        ["[gMASK]", "<sop>"],
        ["<|user|>", "<|assistant|>"],
    ),
    "Qwen, thinking": (
        _loop("<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] | trim }}<|im_end|>\n"),
        ["<|im_start|>", "<|im_end|>"],
        ["<think>", "</think>"],
    ),
}
