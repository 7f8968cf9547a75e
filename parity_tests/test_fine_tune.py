"""The whole way of a user: pre-train, export, fine-tune on chats, and continue in stock transformers and in PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import train
from convert.__main__ import main as convert
from jaxllm.data.tokenizer import encode_prompt, load_tokenizer
from jaxllm.generate import load_model
from jaxllm.model.decoding import Sampling, generate
from jaxllm.store.metrics_file import read_metrics
from parity_tests.__main__ import main as compare

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)
QUESTIONS = ("What does function_3_7 add?", "What does function_21_2 add?", "Who are you?")
NEW = 16
SIZES = (
    "--batch-size", "4", "--seq-len", "64", "--eval-samples", "8", "--sample-tokens", "8", "--precision", "float32",
)  # fmt: skip


def trained(run: Path, *options: str) -> Path:
    assert train.main(["--run-dir", str(run), *SIZES, *options]) == 0
    return run


def exported(run: Path, out: Path, *options: str) -> Path:
    assert convert(["to-torch", str(run), str(out), *options]) == 0
    return out


def evaluations(run: Path) -> list[float]:
    """The loss on held-out chats after each step."""
    return [record["eval_loss"] for record in read_metrics(run) if "eval_loss" in record]


def assert_learned(run: Path) -> None:
    """The loss after the last step is well below that after the first. Later ones are noisy: there are 24 targets."""
    first, *_, last = evaluations(run)
    assert last < 0.7 * first, (first, last)


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory) -> Path:
    """A pre-trained model as it is published, in bfloat16, with a chat template."""
    folder = tmp_path_factory.mktemp("pretrained")
    steps = ("--steps", "30", "--eval-every", "30", "--save-every", "30")
    steps += ("--optimizer", "adamw", "--learning-rate", "4e-3")  # compiles faster than the default
    run = trained(folder / "run", "--preset", "tiny-deepseek", "--data", str(corpus), *steps)
    out = exported(run, folder / "base", "--dtype", "bfloat16")
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out


@pytest.fixture(scope="module")
def options(base, tmp_path_factory) -> list[str]:
    """Of a run on made-up chats that starts from it."""
    chats = [
        [{"role": "user", "content": f"What does function_{i}_{j} add?"}, {"role": "assistant", "content": f"{j}."}]
        for i in range(25)
        for j in range(10)
    ]
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    steps = ["--steps", "30", "--warmup-steps", "3", "--eval-every", "1", "--save-every", "30"]
    return ["--init", str(base), "--data", str(file), *steps]


def prompts(folder: Path) -> list[list[int]]:
    """The questions through the template, as this project and transformers encode them."""
    ours, theirs = load_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    found = [encode_prompt(ours, question, as_chat=True) for question in QUESTIONS]
    for question, ids in zip(QUESTIONS, found, strict=True):
        said = [{"role": "user", "content": question}]
        assert theirs.apply_chat_template(said, add_generation_prompt=True, return_dict=False) == ids
    return found


def ours(run: Path, asked: list[list[int]], end: int) -> list[list[int]]:
    return generate(load_model(run), asked, NEW, Sampling(0.0), seed=0, eos_token_ids=(end,))


def in_transformers(model: Any, asked: list[list[int]], end: int) -> list[list[int]]:
    """Greedy tokens of each prompt, up to the one that ends a text."""
    found, rule = [], {"do_sample": False, "eos_token_id": end, "pad_token_id": end}
    for ids in asked:
        with torch.no_grad():
            made = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=NEW, **rule)[0, len(ids) :].tolist()
        found.append(made[: made.index(end)] if end in made else made)
    return found


def stock(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_all_weights(base, options, tmp_path):
    run = trained(tmp_path / "run", *options, "--learning-rate", "3e-3")
    out = exported(run, tmp_path / "out", "--dtype", "float32")
    asked, end = prompts(out), stock(out).config.eos_token_id
    answers = ours(run, asked, end)
    assert in_transformers(stock(out), asked, end) == answers != ours(base, asked, end)
    assert_learned(run)
    assert "## 'What does function_" in (run / "samples.md").read_text()  # prompts of its own kind


def test_adapters(base, options, tmp_path):
    """Beside the base in PEFT, merged there, merged here, and continued from what PEFT saves."""
    everywhere = ["--lora-targets", "attention,shared,dense,experts"]
    run = trained(tmp_path / "run", *options, "--lora-rank", "4", *everywhere, "--learning-rate", "1e-2")
    adapter = exported(run, tmp_path / "adapter")
    whole = exported(run, tmp_path / "whole", "--merge", "--dtype", "float32")
    asked, end = prompts(whole), stock(whole).config.eos_token_id
    answers = ours(run, asked, end)
    assert answers != ours(base, asked, end)
    assert compare([str(run), "--rungs", "adapters", "--quick", "--out", str(tmp_path / "parity")]) == 0
    assert in_transformers(stock(whole), asked, end) == answers
    model = peft.PeftModel.from_pretrained(stock(base), adapter)
    assert in_transformers(model, asked, end) == answers
    model.save_pretrained(tmp_path / "saved")
    assert in_transformers(model.merge_and_unload(), asked, end) == answers
    assert_learned(run)

    rest = [*options, "--learning-rate", "0", "--steps", "1", "--warmup-steps", "0"]
    again = trained(tmp_path / "again", *rest, "--adapter", str(tmp_path / "saved"))
    np.testing.assert_allclose(evaluations(again)[0], evaluations(run)[-1], rtol=1e-6)
    assert ours(again, asked, end) == answers
