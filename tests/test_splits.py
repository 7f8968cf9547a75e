"""Splits by the names of files and folders, what a run is evaluated on, and every data option with every source."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest

from jaxllm import evaluate
from jaxllm.config import TrainConfig
from jaxllm.data.sources import check_new_data, open_source
from jaxllm.data.splits import Ambiguous, recognized
from jaxllm.data.tokenizer import train_tokenizer
from jaxllm.errors import UserError
from tests.configs import held_out_of, open_files

NAMES = {
    "train-00000-of-00001.jsonl": "train",
    "data/validation-00000-of-00002.jsonl": "validation",
    "my_train_file.csv": "train",
    "Dev.jsonl.gz": "validation",
    "test2.jsonl": "test",
    "en/eval/part.parquet": "test",
    "training/part.parquet": "train",
    "wiki.train.txt": "train",
    "val.txt": "validation",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_hub_s_names_tell_a_split(name):
    others = {"train": "test", "validation": "train", "test": "train"}
    other = f"{others[NAMES[name]]}/x.jsonl" if "/" in name and "data/" not in name else f"{others[NAMES[name]]}.jsonl"
    assert recognized([name, other]) == {name: NAMES[name], other: others[NAMES[name]]}


@pytest.mark.parametrize(
    "names",
    [
        ["a.jsonl", "b.jsonl"],
        ["trains.jsonl", "contest.jsonl", "retrain.jsonl", "evaluate.jsonl"],
        ["train.jsonl", "more.jsonl"],
        ["an evaluation of trains.txt"],
        ["the test of time.txt", "a train journey.txt", "le dormeur du val.txt", "z.txt"],
        ["train.py", "test.py", "model.py"],
        ["src/a.py", "test/test_a.py", "train/b.py"],
        ["en-00000-of-00002.parquet", "en-00001-of-00002.parquet", "de-00000-of-00001.parquet"],
    ],
)
def test_other_names_tell_none(names):
    assert recognized(names) == {}


def test_shards_may_have_splits_of_any_name():
    names = ["train_sft-00000-of-00002-0a1b.parquet", "test_sft-00000-of-00001-0a1b.parquet"]
    assert recognized(names) == dict(zip(names, ("train_sft", "test_sft"), strict=True))


def test_files_of_no_split_next_to_others():
    assert recognized(["train.csv", "test.csv", "extra.csv"])["extra.csv"] is None
    for names in (["a.csv", "test.csv"], ["train.txt", "test.txt", "vocab.txt"], ["train_test.csv", "a.csv"]):
        with pytest.raises(Ambiguous):
            recognized(names)


def write(file: Path, word: str, rows: int = 60) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    texts = [f"{word} {i} words words" for i in range(rows)]
    if file.suffix == ".csv":
        file.write_text("text\n" + "".join(f"{text}\n" for text in texts))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        file.write_text("\n".join(texts))


def read(path: Path, **options) -> tuple[set[str], set[str], str]:
    """First words of what is trained on and of what is evaluated, and what is printed."""
    config = TrainConfig.from_options(data=str(path), **options)
    source = open_source(config.data, config.seed)
    trained = {chunk.text.split()[0] for chunk in source.chunks() if not chunk.held_out}
    evaluated = {chunk.text.split()[0] for chunk in open_source(config.data, config.seed).held_out()}
    said = " ".join([*source.notes, *(line for report in source.reports() for line in report.lines())])
    return trained, evaluated, said


LAYOUTS = {
    "files": ("{}-00000-of-00001.jsonl", ("train", "validation", "test")),
    "files in data": ("data/{}-00000-of-00001.jsonl", ("train", "validation", "test")),
    "folders": ("{}/part.csv", ("train", "validation", "test")),
    "texts": ("{}.txt", ("train", "valid", "test")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_of_a_hub_dataset_is_read_as_on_the_hub(layout, tmp_path):
    form, words = LAYOUTS[layout]
    for word in words:
        write(tmp_path / form.format(word), word)
    train, validation, test = words
    trained, evaluated, said = read(tmp_path)
    assert (trained, evaluated) == ({train}, {validation})
    assert form.format(test) in said
    assert "split 'train' of" in said
    assert "evaluated on the split 'validation'; nothing is held out" in said
    assert read(tmp_path, data_split="test")[:2] == ({test}, {validation})
    assert set().union(*read(tmp_path, data_split="all")[:2]) == {*words}
    assert read(tmp_path, eval_data="test")[:2] == ({train}, {test})
    with pytest.raises(UserError, match=r"no split 'nosuch': pass --data-split, one of .*test.*train.*validation"):
        read(tmp_path, data_split="nosuch")
    with pytest.raises(UserError, match="no split 'nosuch'"):
        read(tmp_path, eval_data="nosuch")
    with pytest.raises(UserError, match="eval_data is 'train': that split is trained on"):
        read(tmp_path, eval_data="train")


def test_without_a_validation_split_a_part_of_the_train_split_is_held_out(tmp_path):
    for word in ("train", "test"):
        write(tmp_path / f"{word}.jsonl", word)
    trained, evaluated, said = read(tmp_path)
    assert (trained, evaluated) == ({"train"}, {"train"})
    assert "test.jsonl (split 'test', and 'train' is read)" in said


def test_a_folder_that_may_have_a_test_set_is_refused_until_the_user_says_so(tmp_path):
    for word in ("a", "b", "test"):
        write(tmp_path / f"{word}.jsonl", word)
    with pytest.raises(UserError, match=r"'test.jsonl' tells the split 'test', and 'a.jsonl' tells none.*--skip-data"):
        read(tmp_path)
    assert read(tmp_path, skip_data="test.jsonl")[0] == {"a", "b"}
    assert read(tmp_path, data_split="all")[0] == {"a", "b", "test"}
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(UserError, match="no split 'train': pass --data-split, one of test"):
        read(tmp_path)


def test_a_run_of_before_reads_all_files_as_it_did(tmp_path):
    for word in ("train", "validation", "test"):
        write(tmp_path / f"{word}.jsonl", word)
    saved = TrainConfig.from_options(data=str(tmp_path), data_split="nosuch", text_field="text").to_dict()
    del saved["hold_out"], saved["eval_data"]
    source = open_source(TrainConfig.from_dict(saved).data, 0)
    assert {chunk.text.split()[0] for chunk in source.chunks()} == {"train", "validation", "test"}
    assert source.hold_out == "count"


@pytest.mark.parametrize(
    ("numbers", "said"),
    [("0 2", "shard 1 of 3 is missing"), ("1", "shards 0, 2 of 3 are missing"), ("0 1 2", ""), ("1 2 3", "")],
)
def test_a_shard_that_is_missing_is_named(numbers, said, tmp_path):
    for number in numbers.split():
        write(tmp_path / f"data/train-0000{number}-of-00003-a{number}.jsonl", "words")
    write(tmp_path / "data/test-00000-of-00002.jsonl", "other")
    source = open_files(tmp_path)
    missing = [note for note in source.notes if "missing" in note]
    assert missing == ([f"data/train: {said}"] if said else [])


def test_a_validation_split_that_is_gone_is_named(tmp_path):
    for word in ("train", "validation", "test"):
        write(tmp_path / f"{word}.jsonl", word)
    config = TrainConfig.from_options(data=str(tmp_path), seq_len=8, eval_samples=2)
    tokenizer = train_tokenizer(open_source(config.data, config.seed), 300)
    config = config.with_options(hold_out=open_source(config.data, config.seed).hold_out)
    held_out_of(config, tokenizer)
    (tmp_path / "validation.jsonl").unlink()
    with pytest.raises(UserError, match="the text that it is evaluated on is missing or empty"):
        held_out_of(config, tokenizer)


def test_splits_that_datasets_saved(tmp_path):
    rows = datasets.Dataset.from_list([{"text": f"words {i}"} for i in range(60)])
    names = {
        name: rows.map(lambda row, name=name: {"text": f"{name} {row['text']}"}) for name in ("train", "dev", "test")
    }
    datasets.DatasetDict(names).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved")[:2] == ({"train"}, {"dev"})
    assert read(tmp_path / "saved" / "test")[0] == {"test"}
    with pytest.raises(UserError, match="no split 'validation': pass --data-split, one of"):
        read(tmp_path / "saved", data_split="validation")


def test_evaluation_data_of_the_user(tmp_path):
    write(tmp_path / "corpus" / "a.jsonl", "mine")
    write(tmp_path / "eval.txt", "other")
    trained, evaluated, said = read(tmp_path / "corpus", eval_data=str(tmp_path / "eval.txt"))
    assert (trained, evaluated) == ({"mine"}, {"other"})
    assert sum(chunk.held_out for chunk in open_files(tmp_path / "corpus").chunks())
    assert "eval.txt; nothing is held out" in said
    with pytest.raises(UserError, match=r"eval_data is 'no/where': there is no such file or folder"):
        read(tmp_path / "corpus", eval_data="no/where")
    write(tmp_path / "corpus" / "mine.txt", "mine")
    own = str(tmp_path / "corpus" / "mine.txt")
    overlapping = TrainConfig.from_options(data=str(tmp_path / "corpus"), eval_data=own)
    with pytest.raises(UserError, match=r"mine\.txt' is trained on, too"):
        check_new_data(overlapping.data, open_source(overlapping.data, 0))
    config = TrainConfig.from_options(data=str(tmp_path / "corpus"), eval_data=str(tmp_path / "eval.txt"), seq_len=8)
    tokenizer = train_tokenizer(open_source(config.data, config.seed), 300)
    assert tokenizer.decode(held_out_of(config, tokenizer).rows[0]).startswith("other")


CARD = """---
license: mit
configs:
- config_name: english
  data_files:
  - split: train
    path: en/a*
  - split: validation
    path: ["en/b.jsonl", "en/none*"]
- config_name: german
  data_files: de/*.jsonl
---
# A dataset
"""


def test_a_dataset_s_card_tells_its_splits_and_configurations(tmp_path):
    for name in ("en/a1", "en/a2", "en/b", "en/c", "de/d"):
        write(tmp_path / f"{name}.jsonl", name[-1] if name[-1].isalpha() else name[3:])
    (tmp_path / "README.md").write_text(CARD)
    with pytest.raises(UserError, match="several configurations: pass --data-config, one of english, german"):
        read(tmp_path)
    trained, evaluated, said = read(tmp_path, data_config="english")
    assert (trained, evaluated) == ({"a1", "a2"}, {"b"})
    assert "en/c.jsonl" in said
    assert read(tmp_path, data_config="german")[0] == {"d"}
    assert set().union(*read(tmp_path, data_config="english", data_split="all")[:2]) == {"a1", "a2", "b"}
    assert set().union(*read(tmp_path, data_split="all")[:2]) == {"a1", "a2", "b", "c", "d"}
    for options in ({"data_config": "french"}, {"data_config": "german", "data_split": "validation"}):
        with pytest.raises(UserError, match="it has"):
            read(tmp_path, **options)
    (tmp_path / "README.md").write_text(CARD.replace("configs:", "configs: ["))  # no YAML
    assert read(tmp_path)[0] == {"a1", "a2", "b", "c", "d"}


# every option with every source

SOURCES = ("stdlib", "text file", "text folder", "rows file", "rows folder", "saved", "splits", "mixture")
SPLIT_SOURCES = ("splits",)
OPTIONS = {
    "data_split": "test",
    "data_config": "name",
    "data_revision": "0123abc",
    "text_field": "body",
    "skip_data": "nosuch*",
    "eval_data": "test",
}
ACCEPTED = {("splits", "data_split"), ("splits", "eval_data")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("sources")
    write(root / "a.txt", "words")
    write(root / "texts" / "a.txt", "words")
    write(root / "texts" / "b.txt", "words")
    write(root / "a.jsonl", "words")
    write(root / "rows" / "a.jsonl", "words")
    write(root / "rows" / "b.csv", "words")
    for word in ("train", "test"):
        write(root / "splits" / f"{word}.jsonl", word)
    datasets.Dataset.from_list([{"text": f"words {i}"} for i in range(60)]).save_to_disk(root / "saved")
    names = ("stdlib", "a.txt", "texts", "a.jsonl", "rows", "saved", "splits")
    paths = [name if name == "stdlib" else str(root / name) for name in names]
    return dict(zip(SOURCES, [*paths, f"{root / 'texts'}=1,{root / 'rows'}=2"], strict=True))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", SOURCES)
def test_no_option_is_ignored(kind, option, sources):
    """It is refused in one line that names it, or it has an effect."""
    config = TrainConfig.from_options(data=sources[kind])
    changed = config.with_options(**{option: OPTIONS[option]})

    def outcome(config: TrainConfig) -> list[str]:
        source = open_source(config.data, config.seed)
        check_new_data(config.data, source)
        held_out = [
            chunk.text for _, chunk in zip(range(3), open_source(config.data, config.seed).held_out(), strict=False)
        ]
        return [chunk.text for _, chunk in zip(range(3), source.chunks(), strict=False)] + held_out

    if (kind, option) in ACCEPTED:
        assert outcome(changed) != outcome(config)
        return
    with pytest.raises(UserError) as refused:
        outcome(changed)
    assert "\n" not in str(refused.value)
    words = {"data_split": ("split",), "eval_data": ("split",), "text_field": ("text_field", "body")}.get(
        option, (option,)
    )
    assert any(word in str(refused.value) for word in words)


@pytest.mark.parametrize("kind", SOURCES)
def test_options_that_apply_have_an_effect(kind, sources, tmp_path):
    write(tmp_path / "other.txt", "other")
    config = TrainConfig.from_options(data=sources[kind], eval_data=str(tmp_path / "other.txt"))
    assert next(iter(open_source(config.data, config.seed).held_out())).text.startswith("other")
    assert not any(
        chunk.held_out for _, chunk in zip(range(300), open_source(config.data, config.seed).chunks(), strict=False)
    )


@pytest.mark.slow
def test_evaluating_a_model_reads_all_of_a_folder_or_a_split(run, tmp_path, capsys):
    for word in ("train", "test"):
        write(tmp_path / f"{word}.jsonl", word)
    sizes = {}
    for options in ((), ("--data-split", "train"), ("--data-split", "test")):
        assert evaluate.main([str(run), "--data", str(tmp_path), *options]) == 0
        sizes[options] = int(re.search(r"\(([\d,]+) bytes", capsys.readouterr().out)[1].replace(",", ""))
    whole, *splits = sizes.values()
    assert whole == sum(splits)
    assert evaluate.main([str(run), "--data", str(tmp_path), "--data-split", "dev"]) == 2
    assert "no split 'dev'" in capsys.readouterr().err
