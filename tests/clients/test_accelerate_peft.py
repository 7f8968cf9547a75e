"""accelerate and PEFT: offloading, adapters."""

from __future__ import annotations

import pytest
import torch

accelerate = pytest.importorskip("accelerate")


@torch.no_grad()
def offloaded(client, way: str, folder):
    if way == "device_map":
        layers = {name for name, m in client.load().named_modules() if type(m).__name__.endswith("DecoderLayer")}
        names = {name for name, p in client.load().named_parameters()}
        names |= {name for name, _ in client.load().named_buffers()}
        places = dict.fromkeys(layers, "disk")
        others = {n.rpartition(".")[0] for n in names if not any(n.startswith(f"{layer}.") for layer in layers)}
        return client.load(device_map=places | dict.fromkeys(others, "cpu"), offload_folder=folder)
    model = client.load()
    if way == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
    return model


@pytest.mark.parametrize("way", ["cpu", "disk", "device_map"])
@torch.no_grad()
def test_offloading_changes_nothing(client, tmp_path, way):
    """Every weight is only there while its own module runs: none may be read from outside."""
    batch = client.padded()
    wanted = client.load()(**batch).logits
    torch.testing.assert_close(offloaded(client, way, tmp_path)(**batch).logits, wanted)


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def adapted(client, peft, **options):
    if not client.is_ours:
        client.skip_before("5.23", "PEFT 0.21 hides a buffer that the experts of the control read")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, **options)
    torch.manual_seed(0)
    return peft.get_peft_model(client.load(), config)


def test_every_adapter_learns(client, peft):
    model, batch = adapted(client, peft), client.padded()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    silent = [n for n, p in model.named_parameters() if "lora_B" in n and (p.grad is None or not p.grad.any())]
    assert [n for n in silent if "experts" not in n] == []  # an expert may get no token
    if client.is_ours:
        assert any("router" in n for n, p in model.named_parameters() if "lora_B" in n)


@torch.no_grad()
def test_a_merged_adapter_computes_the_same(client, peft, tmp_path):
    model, batch = adapted(client, peft), client.padded()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.02)
    plain = client.load()(**batch).logits
    wanted = model.eval()(**batch).logits
    assert (wanted - plain).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(client.load(), tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, wanted)
    merged = model.merge_and_unload()(**batch).logits
    torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()) * 10)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens(client, peft, kind):
    if kind == "PrefixTuningConfig" and not client.is_ours:
        pytest.skip("PEFT has no prefix of latents")
    options = {"num_virtual_tokens": 5, "task_type": "CAUSAL_LM"}
    model, batch = peft.get_peft_model(client.load(), getattr(peft, kind)(**options)), client.padded()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.requires_grad else 1)  # so that the tokens depend on them
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    new = model.eval().generate(**batch, **options)
    assert new.shape == (3, 29)
    if client.is_ours:  # to the control, with transformers 5.24, PEFT 0.21 gives the virtual tokens again in each step
        assert torch.equal(new, one_by_one(model, **batch))
        assert not torch.equal(new, client.load().generate(**batch, **options))


@torch.no_grad()
def one_by_one(model, input_ids, attention_mask) -> torch.Tensor:
    """Five tokens, each from a forward pass over all before it."""
    for _ in range(5):
        token = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -1:].argmax(-1)
        input_ids = torch.cat([input_ids, token], dim=1)
        attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=1)
    return input_ids
