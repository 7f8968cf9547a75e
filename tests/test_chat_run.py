"""A run on chats, from its data to its samples: trained, evaluated and continued on what the assistant says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from chat_templates import FAMILIES, tokenizer_of
from fingerprint import fingerprint
from safetensors.numpy import load_file

import train
from jaxllm import evaluate
from jaxllm.config import TrainConfig
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.files import read_json, write_json
from jaxllm.model.batch import IGNORED, token_batch
from jaxllm.run.replay import replay
from jaxllm.store.metrics_file import read_metrics


@pytest.fixture(scope="module")
def arguments(narrow_model, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("chats")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i} plus 1? " + "hm " * (i % 7)},
                {"role": "assistant", "content": f"{i + 1}." + " Sure." * (i % 5)},
            ]
        }
        for i in range(200)
    ]
    rows[3:3] = [{"messages": rows[0]["messages"][:1]}]  # nobody answers
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer_of(FAMILIES["ChatML"], "byte-level").save_pretrained(folder / "tokenizer")
    sizes = ["--model.vocab-size", "800", "--seq-len", "64", "--model.max-position-embeddings", "96"]
    steps = ["--steps", "8", "--save-every", "4", "--eval-every", "4", "--log-every", "1", "--eval-samples", "6"]
    data = ["--data", str(folder / "chats.jsonl"), "--tokenizer", str(folder / "tokenizer")]
    return [*narrow_model, *data, *sizes, *steps, "--sample-tokens", "12"]


@pytest.fixture(scope="module")
def chat_run(arguments, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "chat"
    assert train.main([*arguments, "--run-dir", str(folder)]) == 0
    return folder


def test_what_the_rows_are_decides_what_is_trained_on(chat_run):
    saved = read_json(chat_run / "train_config.json")
    assert (saved["train_on"], saved["documents"]) == ("assistant", "separate")
    lines = read_json(chat_run / "data_report.json")["lines"]
    assert any("trained on assistant, documents separate: in the rows that are evaluated" in line for line in lines)
    assert any(line.startswith("read as ") and "chats, " in line for line in lines)


def test_the_evaluation_is_on_targets_and_says_how_many(chat_run):
    config = TrainConfig.from_dict(read_json(chat_run / "train_config.json"))
    rows = load_file(chat_run / "held_out.safetensors")["rows"]
    batch = token_batch(rows, config.data)
    evaluated = [record for record in read_metrics(chat_run) if "eval_loss" in record]
    assert {record["eval_targets"] for record in evaluated} == {int((batch.labels[:, 1:] != IGNORED).sum())}
    tokenizer = load_tokenizer(str(chat_run / "tokenizer"))
    said = tokenizer.decode(batch.targets[batch.targets != IGNORED])
    assert "plus" not in said
    assert said.count("<|im_end|>") == batch.documents.max(axis=1).sum()


def test_a_killed_run_resumes_to_the_same_bits(chat_run, arguments, tmp_path):
    folder = shutil.copytree(chat_run, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "8")
    assert train.main([*arguments, "--run-dir", str(folder)]) == 0
    assert fingerprint(folder) == fingerprint(chat_run)


def test_samples_answer_what_is_asked_in_the_chats_that_are_held_out(chat_run):
    """Through the template, and not the code of other runs."""
    asked = read_json(chat_run / "train_config.json")["prompts"]
    assert len({*asked}) == 5
    assert all(re.fullmatch(r"\d+ plus 1\? (hm )*", prompt) for prompt in asked)
    text = (chat_run / "samples.md").read_text()
    assert re.findall("^## '(.*)'$", text, re.MULTILINE) == [prompt.strip() for prompt in asked]
    assert not any(prompt in answer for prompt, answer in zip(asked, text.split("````")[1::2], strict=True))


def test_a_row_that_is_skipped_is_counted_once(chat_run):
    """However often the rows were read ahead: 200 are fewer than the pool."""
    assert "; skipped 1 row without text or target" in (chat_run / "report.md").read_text()


def test_evaluate_scores_the_targets_of_the_run_and_of_other_chats(chat_run, arguments, tmp_path, capsys):
    """And every token of chats for a run that was trained on every token; it says which."""
    evaluate.main([str(chat_run)])
    assert "Scored         what the assistant says, or the completions; documents separate" in capsys.readouterr().out
    other = ["--data", arguments[arguments.index("--data") + 1], "--max-tokens", "500"]
    counts = []
    run = shutil.copytree(chat_run, tmp_path / "run")
    for what in ("what the assistant says, or the completions", "every token"):
        evaluate.main([str(run), *other])
        out = capsys.readouterr().out
        assert f"Scored         {what}; documents separate" in out
        counts.append(tuple(int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:\(targets|tokens)", out)))
        write_json(run / "train_config.json", read_json(run / "train_config.json") | {"train_on": "all"})
    (targets, tokens), (every, _) = counts
    assert targets < 0.7 * tokens < every


@pytest.mark.slow
def test_a_replayed_step_has_the_run_s_batch(chat_run, capsys):
    replay(chat_run, 6)
    assert "Everything in it is finite" in capsys.readouterr().out
    batch = load_file(chat_run / "replay" / "6" / "batch.safetensors")
    assert batch["documents"].max() > 1
    assert (batch["ids"][batch["labels"] == IGNORED] > 0).any()  # a masked prompt is an input
    assert float(read_metrics(chat_run)[0]["loss"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--documents", "joined"], ["--train-on", "all"]])
def test_joined_chats_and_whole_chats_are_trained_on(options, arguments, tmp_path):
    short = ["--steps", "2", "--save-every", "2", "--eval-every", "2", "--sample-tokens", "0"]
    assert train.main([*arguments, *options, *short, "--run-dir", str(tmp_path / "run")]) == 0
    rows = load_file(tmp_path / "run" / "held_out.safetensors")["rows"]
    config = TrainConfig.from_dict(read_json(tmp_path / "run" / "train_config.json"))
    batch = token_batch(rows, config.data)
    assert (batch.documents is None) == ("joined" in options)
    assert ((rows != IGNORED).all()) == ("joined" in options)
    assert np.isfinite(
        [record["eval_loss"] for record in read_metrics(tmp_path / "run") if "eval_loss" in record]
    ).all()


@pytest.mark.slow
def test_a_run_from_before_there_was_a_choice_resumes(run, narrow, tmp_path):
    """Its config names neither, and its numbers stay."""
    folder = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "20")
    saved = read_json(folder / "train_config.json")
    assert (saved.pop("train_on"), saved.pop("documents")) == ("all", "joined")
    write_json(folder / "train_config.json", saved)
    (folder / "held_out.safetensors").unlink()
    assert train.main([*narrow, "--run-dir", str(folder)]) == 0
    assert fingerprint(folder) == fingerprint(run)


def test_nobody_answers_in_texts(narrow, tmp_path, capsys):
    assert train.main([*narrow, "--train-on", "assistant", "--run-dir", str(tmp_path / "run")]) == 2
    assert "train_on is 'assistant'" in capsys.readouterr().err
