"""transformers' Trainer and TRL: a few steps each, and what the loss must be."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

pytestmark = pytest.mark.slow

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
COMMON = {
    "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "report_to": "none", "logging_steps": 1,
    "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 0, "bf16": False,
}  # fmt: skip


def losses(trainer) -> list[float]:
    trainer.train()
    found = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(found) == COMMON["max_steps"]
    assert all(map(math.isfinite, found))
    return found


def texts(count: int = 12) -> list[str]:
    return [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 3) for i in range(count)]


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}])
def test_trainer(client, tmp_path, options):
    rows = [{"input_ids": client.tokenizer(text).input_ids} for text in texts()]
    collate = DataCollatorForLanguageModeling(client.tokenizer, mlm=False)
    model = client.load()
    with torch.no_grad():
        batch = collate(rows)
        wanted = model(**batch).loss.item()
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    targets = batch["labels"][:, 1:].flatten()
    assert wanted == pytest.approx(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets).item())
    args = TrainingArguments(str(tmp_path), **COMMON, **options)
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    losses(trainer)
    assert trainer.evaluate()["eval_loss"] < wanted


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_trainer_of_a_classifier(client, tmp_path, auto):
    one = auto is AutoModelForSequenceClassification
    rows = [{"input_ids": client.ids(9, seed=i).tolist(), "labels": i % 3 if one else [i % 3] * 9} for i in range(12)]
    args = TrainingArguments(str(tmp_path), **COMMON, gradient_accumulation_steps=2)
    losses(Trainer(client.load(auto, num_labels=3), args, train_dataset=rows))


def trl_model(client, lora: bool):
    model = client.load()
    if not lora:
        return model, None
    if not client.is_ours:
        client.skip_before("5.23", "PEFT 0.21 hides a buffer that the experts of the control read")
    peft = pytest.importorskip("peft")
    return model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_supervised_fine_tuning(client, tmp_path, packing, lora):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model, adapter = trl_model(client, lora)
    args = trl.SFTConfig(str(tmp_path), **COMMON, packing=packing, max_length=64)
    data = Dataset.from_list([{"text": text} for text in texts()])
    losses(trl.SFTTrainer(model, args, train_dataset=data, processing_class=client.tokenizer, peft_config=adapter))


def test_chat_with_an_adapter(client, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model, adapter = trl_model(client, True)
    client.tokenizer.chat_template = CHAT
    rows = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": t}] for i, t in enumerate(texts())]
    args = trl.SFTConfig(str(tmp_path), **COMMON, max_length=64, assistant_only_loss=True)
    data = Dataset.from_list([{"messages": row} for row in rows])
    losses(trl.SFTTrainer(model, args, train_dataset=data, processing_class=client.tokenizer, peft_config=adapter))


def test_preferences(client, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    args = trl.DPOConfig(str(tmp_path), **COMMON, max_length=64, trust_remote_code=True)  # of the reference, by name
    rows = [{"prompt": "def f", "chosen": text, "rejected": "x"} for text in texts()]
    data = Dataset.from_list(rows)
    found = losses(trl.DPOTrainer(client.load(), args=args, train_dataset=data, processing_class=client.tokenizer))
    assert found[0] == pytest.approx(math.log(2), rel=1e-3)  # model and reference are the same at first


def test_rewards(client, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    args = trl.RewardConfig(str(tmp_path), **COMMON, max_length=64)
    data = Dataset.from_list([{"chosen": text, "rejected": "x"} for text in texts()])
    model = client.load(AutoModelForSequenceClassification, num_labels=1)
    losses(trl.RewardTrainer(model, args=args, train_dataset=data, processing_class=client.tokenizer))


def test_policy_gradients(client, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    options = COMMON | {"max_steps": 3, "per_device_train_batch_size": 4}
    args = trl.GRPOConfig(str(tmp_path), **options, num_generations=4, max_completion_length=8)
    data = Dataset.from_list([{"prompt": "def f"} for _ in range(12)])
    reward = lambda completions, **kwargs: [float(len(text)) for text in completions]  # noqa: E731
    losses(trl.GRPOTrainer(client.load(), reward, args=args, train_dataset=data, processing_class=client.tokenizer))
