"""Compilers, exporters, quantizers and evaluation harnesses."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.slow


@torch.no_grad()
def test_compilation_breaks_no_graph(client):
    model, batch = client.load(), client.padded()
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(**batch, use_cache=False)
    assert explained.graph_break_count == 0, explained.break_reasons
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    real = batch["attention_mask"].bool()
    difference = compiled(**batch, use_cache=False).logits - model(**batch, use_cache=False).logits
    assert difference[real].abs().max() < 1e-5


def test_compiled_generation(client):
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model, batch = client.load(), client.padded()
    plain = model.generate(**batch, **options)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="aot_eager", dynamic=False)
    compiled = model.generate(**batch, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(compiled, plain)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def test_onnx(client, tmp_path):
    if not client.is_ours:
        pytest.skip("ONNX has no grouped product, which the control's experts are")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, axes = Logits(client.load()), {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("time", max=100)}
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (client.ids(2, 9),), file, dynamo=True, dynamic_shapes=({0: axes[0], 1: axes[1]},))
    session = onnxruntime.InferenceSession(file)
    for shape in ((2, 9), (1, 3), (4, 30)):
        ids = client.ids(*shape)
        (logits,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(ids), rtol=0, atol=1e-4)


@torch.no_grad()
def test_jit_trace(client):
    """Other tokens choose other experts: a trace that keeps the first choice is wrong."""
    client.skip_before("5.23", "its masks cannot be traced, of the control neither")
    model = Logits(client.load())
    traced = torch.jit.trace(model, (client.ids(2, 9),), check_trace=False)
    for seed in (1, 2, 3):
        ids = client.ids(2, 9, seed=seed)
        torch.testing.assert_close(traced(ids), model(ids), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("grad", [False, True])
def test_dynamic_int8(client, grad):
    """One token at a time: most experts have no rows."""
    model = client.load()
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    with torch.set_grad_enabled(grad):
        alike = [
            torch.nn.functional.cosine_similarity(quantized(ids).logits, model(ids).logits, dim=-1).item()
            for ids in client.ids(20, 1).split(1)
        ]
    assert sum(alike) / len(alike) > 0.95  # a token may go to another expert


def chosen(model, batch) -> torch.Tensor:
    """(L,N,k), at real tokens."""
    found, handles = [], []
    for module in model.modules():
        if type(module).__name__ == "DeepSeekMoE":
            handles.append(module.register_forward_hook(lambda m, args, out: found.append(out[1].experts)))
    model(**batch)
    for handle in handles:
        handle.remove()
    real = batch["attention_mask"].bool().flatten()
    return torch.stack(found)[:, real]


@torch.no_grad()
@pytest.mark.parametrize("library", ["bitsandbytes", "torchao", "quanto"])
def test_eight_bits_choose_the_same_experts(ours, library):
    import transformers

    batch = ours.padded(8, 60)
    if library == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    elif library == "torchao":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        pytest.importorskip("optimum.quanto")
        config = transformers.QuantoConfig(weights="int8")
    model, plain = ours.load(quantization_config=config, device_map="cpu"), ours.load()
    assert type(model.decoder_layers[0].mlp.router).__name__ == "Router"  # left as it is
    assert type(model.decoder_layers[0].self_attn.o_proj.weight) is not torch.nn.Parameter or (
        type(model.decoder_layers[0].self_attn.o_proj) is not torch.nn.Linear
    )
    same = (chosen(model, batch)[..., None] == chosen(plain, batch)[..., None, :]).any(-1).float().mean()
    assert same >= 0.99
    logits = [m(**batch).logits[batch["attention_mask"].bool()].float() for m in (model, plain)]
    assert torch.nn.functional.cosine_similarity(*logits).median() > 0.99


def test_lm_eval(client, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    model = client.load()
    harness = HFLM(pretrained=model, tokenizer=client.tokenizer, batch_size=2, device="cpu")
    from lm_eval.api.instance import Instance

    pairs = [("def f(x):", "\n    return"), ("def g", "(x):")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (before, after), (score, _) in zip(pairs, harness.loglikelihood(requests), strict=True):
        head, tail = (client.tokenizer(t, return_tensors="pt").input_ids for t in (before, after))
        whole = client.tokenizer(before + after, return_tensors="pt").input_ids
        if torch.equal(whole, torch.cat([head, tail], dim=1)):
            with torch.no_grad():
                log_p = model(whole).logits.log_softmax(-1)[0, head.shape[1] - 1 : -1]
            assert score == pytest.approx(log_p.gather(-1, tail[0][:, None]).sum().item(), rel=1e-4)
    assert lm_eval is not None
