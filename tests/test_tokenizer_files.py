"""Tokenizers of real folders: files of ranks and SentencePiece models, read without running their code, or refused."""

from __future__ import annotations

import base64
import io
import itertools
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import regex  # transformers needs it

from jaxllm.data.encode import encoder_of
from jaxllm.data.rank_file import RANK_CLASSES
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.data.tokenizer_class import check_tokenizer_class
from jaxllm.data.tokenizer_files import has_tokenizer
from jaxllm.errors import UserError
from jaxllm.files import write_json

SPLIT = "|".join(RANK_CLASSES["TikTokenTokenizer"].split)
TRAINED_ON = (
    "def f(x):\n    return x + 12345\n" * 3 + "汉字和文字 text汉字 中文English混合 日本語のテキスト\n"
    "}\n///\n } \n/// don't DON'T I'LL it's the function the function\r\n\r\n   \n"
) * 4
TEXTS = (
    "}\n///", "}\n/// doc\n", "a/b//c", "text汉字text", "汉字abc 北京市 Pascal", "中文English混合",
    "don't DON'T I'LL it's ab's", "1234567 12 3", "a\r\n\r\n b\n\n\n  c", "  x", " ", "\n", "日本語のテキスト",
    "ÀÉÎ ﬁ x²\u0301 e\u0301", "😀 \U00020000漢", "the function", TRAINED_ON,
)  # fmt: skip


def words(text: str) -> list[bytes]:
    return [word.encode() for word in regex.findall(SPLIT, text, flags=regex.V1)]


def merged(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What tiktoken does: join the neighbours whose pair has the lowest rank, the first of equal ones."""
    parts = [bytes([byte]) for byte in word]
    while pairs := [(ranks[joined], i) for i in range(len(parts) - 1) if (joined := parts[i] + parts[i + 1]) in ranks]:
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def expected(text: str, ranks: dict[bytes, int]) -> list[int]:
    return [ranks[part] for word in words(text) for part in ([word] if word in ranks else merged(word, ranks))]


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Ranks of all bytes, in another order than theirs, and of frequent pairs."""
    found = {bytes([(byte * 7) % 256]): byte for byte in range(256)}
    held = [[bytes([byte]) for byte in word] for word in words(TRAINED_ON)]
    while len(found) < 320:
        pairs = Counter(pair for parts in held for pair in itertools.pairwise(parts))
        (left, right), _ = pairs.most_common(1)[0]
        found.setdefault(left + right, len(found))
        held = [merged(b"".join(parts), found) for parts in held]
    return found


def token(content: str, special: bool = True) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "special": special}


@pytest.fixture(scope="module")
def made(ranks, tmp_path_factory) -> Path:
    """A folder as Moonlight's."""
    folder, n = tmp_path_factory.mktemp("ranks") / "moonlight", len(ranks)
    folder.mkdir()
    lines = (base64.b64encode(part) + b" %d\n" % rank for part, rank in ranks.items())
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    alternatives = ",\n        ".join(f'r"""{part}"""' for part in RANK_CLASSES["TikTokenTokenizer"].split)
    (folder / "tokenization_moonshot.py").write_text(f'open("ran", "w")\npattern = "|".join([{alternatives}])\n')
    named = {n: token("[BOS]"), n + 1: token("[EOS]"), n + 2: token("<|im_end|>"), n + 3: token("<|call|>", False)}
    named |= {n + 254: token("[UNK]"), n + 255: token("[PAD]")}
    config = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
        "added_tokens_decoder": {str(id): entry for id, entry in named.items()},
        "additional_special_tokens": ["<|im_end|>"],
        "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]", "pad_token": "[PAD]",
        "model_max_length": 4096,
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "folder"))


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def random_texts(count: int = 400) -> list[str]:
    rng, letters = random.Random(0), "ab'sTdLl 1/\n\r\t汉字é\u0301}.-語ひ\U00020000"
    return ["".join(rng.choice(letters) for _ in range(rng.randint(1, 40))) for _ in range(count)]


def test_a_file_of_ranks_encodes_as_its_code_would(made, ranks, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer(str(made))
    assert not (tmp_path / "ran").exists()
    for text in (*TEXTS, *random_texts()):
        ids = ids_of(tokenizer, text)
        assert ids == expected(text, ranks), text
        assert tokenizer.decode(ids) == text
        np_ids = encoder_of(tokenizer, "text").ids(text)
        assert np_ids.tolist() == ids


def test_a_file_of_ranks_encodes_as_tiktoken(made, ranks):
    tiktoken = pytest.importorskip("tiktoken")
    theirs = tiktoken.Encoding("ranks", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
    tokenizer = load_tokenizer(str(made))
    for text in (*TEXTS, *random_texts()):
        assert ids_of(tokenizer, text) == theirs.encode_ordinary(text), text


def test_the_split_is_o200k_s_with_three_changes(made):
    """By hand: what o200k would not do."""
    assert words("}\n///") == [b"}\n", b"///"]  # o200k: }\n///
    assert [word.decode() for word in words("text汉字")] == ["text", "汉字"]  # o200k: one word
    assert [word.decode() for word in words("汉字text")] == ["汉字", "text"]
    tokenizer: Any = load_tokenizer(str(made))
    for text in (*TEXTS, *random_texts()):
        split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert [text[start:end].encode() for _, (start, end) in split] == words(text)


def test_tokens_after_the_ranks_are_those_of_the_config_and_reserved_ones(made, ranks):
    tokenizer, n = load_tokenizer(str(made)), len(ranks)
    assert len(tokenizer) == n + 256
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (n, n + 1, n + 255)
    assert tokenizer.convert_ids_to_tokens([n + 2, n + 3, n + 4]) == [
        "<|im_end|>",
        "<|call|>",
        f"<|reserved_token_{n + 4}|>",
    ]
    chat: Any = tokenizer.apply_chat_template([{"role": "user", "content": "汉字"}], tokenize=False)
    assert chat == "汉字<|im_end|>"
    assert ids_of(tokenizer, chat)[-1] == n + 2
    assert n + 2 not in encoder_of(tokenizer, "text").ids("<|im_end|>")  # what a text spells is text


def test_code_that_is_not_run_is_said(made, capsys):
    check_tokenizer_class(made, load_tokenizer(str(made)), {"model_type": "deepseek_v3"})
    assert "'TikTokenTokenizer' is code of the folder, which is not run: its split is known" in capsys.readouterr().out


def with_config(**changes: Any):
    def change(folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        values = json.loads(file.read_text()) | changes
        write_json(file, {key: value for key, value in values.items() if value is not None})

    return change


def with_line(line: bytes):
    def change(folder: Path) -> None:
        file = folder / "tiktoken.model"
        file.write_bytes(file.read_bytes() + line)

    return change


DAMAGE = {
    "another class": (with_config(tokenizer_class="QWenTokenizer"), "and it is 'QWenTokenizer'; train with"),
    "no class": (with_config(tokenizer_class=None), "and it is None; train with --tokenizer FOLDER"),
    "another split": (
        lambda folder: (folder / "tokenization_moonshot.py").write_text(r'p = r"\p{N}{1,2}"'),
        r"tokenization_moonshot\.py splits text differently from the TikTokenTokenizer that is read here; train with",
    ),
    "no code": (lambda folder: (folder / "tokenization_moonshot.py").write_text("def ("), "is not valid Python"),
    "no tokens": (with_config(added_tokens_decoder=None), "added_tokens_decoder is None: it must name the special"),
    "an id that is none": (
        with_config(added_tokens_decoder={"5": token("[BOS]")}),
        r"has '\[BOS\]' as 5: with 320 ranks in tiktoken\.model, ids are 320 to 575",
    ),
    "two ids of a token": (
        with_config(added_tokens_decoder={"320": token("[BOS]"), "321": token("[BOS]")}), r"\[BOS\] has two ids",
    ),
    "a line of text": (with_line(b"text\n"), "line 321: a token in base 64 and its rank are expected"),
    "no base 64": (with_line(b"!!!! 320\n"), "line 321: a token in base 64"),
    "a gap": (with_line(base64.b64encode(b"abcdefgh") + b" 322\n"), "the ranks must be 0, 1, 2"),
    "half of the file": (
        lambda folder: (folder / "tiktoken.model").write_bytes(
            b"\n".join((folder / "tiktoken.model").read_bytes().splitlines()[:200])
        ),
        "have no rank",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_ranks_that_are_not_known_are_refused_in_one_line(damage, folder):
    change, message = DAMAGE[damage]
    change(folder)
    with pytest.raises(UserError, match=message) as refused:
        load_tokenizer(str(folder))
    assert "\n" not in str(refused.value)


# SentencePiece


@pytest.fixture(params=["bpe", "unigram"])
def pieces(request, tmp_path) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    made = io.BytesIO()
    lines = [line for line in TRAINED_ON.splitlines() if line.strip()] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=made, vocab_size=330, model_type=request.param,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        character_coverage=1.0, hard_vocab_limit=False,
    )  # fmt: skip
    folder = tmp_path / "pieces"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    write_json(folder / "tokenizer_config.json", names)
    return folder


def test_a_sentencepiece_model_encodes_as_the_library(pieces):
    import sentencepiece  # pyright: ignore[reportMissingImports]

    theirs: Any = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    tokenizer = load_tokenizer(str(pieces))
    for text in TEXTS:
        assert ids_of(tokenizer, text) == theirs.encode(text), text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (theirs.bos_id(), theirs.eos_id())


def test_a_file_of_ranks_that_is_called_a_sentencepiece_model_is_refused(pieces, made):
    shutil.copy(made / "tiktoken.model", pieces / "tokenizer.model")
    with pytest.raises(UserError, match=r"tokenizer\.model is not a SentencePiece model|could not be loaded"):
        load_tokenizer(str(pieces))


def test_a_sentencepiece_model_is_refused_with_the_remedy_where_it_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x05\n\x03abc")
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "XLMRobertaTokenizer"})
    with pytest.raises(UserError, match=r"and it is 'XLMRobertaTokenizer'; train with --tokenizer FOLDER, one with"):
        load_tokenizer(str(tmp_path))
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    monkeypatch.setattr("jaxllm.data.sentencepiece_file.is_installed", lambda name: name != "sentencepiece")
    with pytest.raises(UserError, match=r"is read with sentencepiece: pip install sentencepiece protobuf; train with"):
        load_tokenizer(str(tmp_path))
    assert not has_tokenizer(tmp_path)
