"""Tokenizer folders as somebody hostile would make them."""

from __future__ import annotations

from typing import Any

from fuzz_strategies import INTEGERS, TEXTS, VALUES, changed, damaged, json_files, written
from hypothesis import strategies as st

PARTS = ("normalizer", "pre_tokenizer", "decoder", "post_processor", "model", "truncation", "padding", "added_tokens")


def _replacement(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def _sequence(kind: str, steps: list[Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: steps}


COMPONENTS = [
    None,
    _replacement("a", "a" * 1000),
    _sequence("normalizers", [_replacement("a", "a" * 8)] * 30),
    _sequence("decoders", [_replacement("a", "a" * 8)] * 30),
    {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"},
    {"type": "Precompiled", "precompiled_charsmap": "/////w=="},
    {"type": "Prepend", "prepend": "x" * 100_000},
    {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    {"type": "FixedLength", "length": 0},
    {"type": "Metaspace", "replacement": "▁▁", "prepend_scheme": "always", "split": True},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [],
     "special_tokens": {}},
    {"type": "BPE", "vocab": {}, "merges": []},
    {"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []},
    {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": ["a b"], "unk_token": "no"},
    {"type": "WordLevel", "vocab": {"a": 2**31}, "unk_token": "[UNK]"},
    {"type": "Unigram", "vocab": [["a", 1e308]], "unk_id": 10**6},
    {"type": "Unigram", "vocab": [], "unk_id": None},
    {"type": "WordPiece", "vocab": {"a": 1}, "unk_token": "u", "continuing_subword_prefix": "",
     "max_input_chars_per_word": 0},
    {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5},
    {"strategy": {"Fixed": 4_000_000_000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
     "pad_type_id": 0, "pad_token": "x"},
    [{"id": 2**31, "content": "<a>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
      "special": True}],
    [{"id": 2**32 - 1, "content": "", "single_word": True, "lstrip": True, "rstrip": True, "normalized": True,
      "special": False}],
]  # fmt: skip

CODE = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for i in range(10**9) %}{% endfor %}"

# What transformers may look at in tokenizer_config.json.
CONFIG_KEYS = (
    "auto_map", "tokenizer_class", "chat_template", "fast_tokenizer_files", "tokenizer_file", "vocab_file", "gguf_file",
    "init_inputs", "tokenizer_object", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens",
    "eos_token", "bos_token", "pad_token", "unk_token", "model_max_length", "padding_side", "backend", "vocab",
    "model_input_names", "split_special_tokens", "add_prefix_space", "name_or_path", "model_specific_special_tokens",
    "post_processor", "tokenizer_truncation", "tokenizer_padding", "merges", "verbose", "self", "cls", "is_local",
    "local_files_only", "processor_class", "response_schema", "add_bos_token", "add_eos_token", "trust_remote_code",
)  # fmt: skip


@st.composite
def tokenizer_folders(draw, contents: dict[str, Any], canary: str) -> dict[str, bytes]:
    """Contents of the files that are not what they were."""
    kind = draw(st.sampled_from(["part", "part", "json", "config", "config", "map", "added", "bytes", "template"]))
    whole = contents["tokenizer.json"]
    if kind == "part":
        parts = draw(st.lists(st.sampled_from(PARTS), min_size=1, max_size=2, unique=True))
        new = st.one_of(st.sampled_from(COMPONENTS), VALUES)
        return {"tokenizer.json": written(whole | {part: draw(new) for part in parts})}
    if kind == "json":
        return {"tokenizer.json": written(draw(changed(whole)))}
    if kind == "bytes":
        return {"tokenizer.json": draw(damaged(written(whole)))}
    if kind == "config":
        hostile = st.one_of(
            VALUES, st.sampled_from([canary, [canary], ["../" * 9 + canary], CODE, {"AutoTokenizer": "evil.Evil"}])
        )
        keys = draw(st.lists(st.sampled_from(CONFIG_KEYS), min_size=1, max_size=3, unique=True))
        return {"tokenizer_config.json": written(contents["tokenizer_config.json"] | {k: draw(hostile) for k in keys})}
    if kind == "template":
        return {"chat_template.jinja": draw(st.sampled_from([CODE.encode(), b"\xff", b"{% x"]))}
    token = {"content": draw(TEXTS), "lstrip": draw(VALUES)}
    special = {"eos_token": draw(st.one_of(VALUES, st.just(token))), "bos_token": "<|endoftext|>"}
    if kind == "map":
        return {"tokenizer_config.json": b"{}", "special_tokens_map.json": draw(json_files(special))}
    return {
        "tokenizer_config.json": b"{}",
        "added_tokens.json": written({draw(TEXTS): draw(st.one_of(INTEGERS, VALUES))}),
    }
