"""The PyTorch model as one graph: torch.compile(fullgraph=True), forward and backward, and torch.export.

The number of tokens of an expert depends on the data. The graph must serve every routing, including experts without
tokens.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import torch_ref.model as reference
from jaxllm import ModelConfig
from parity_tests.compare import TOLERANCES, compare_arrays
from parity_tests.forward import random_weights, torch_model
from torch_ref import CustomLLM

SMALL = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    moe_intermediate_size=16,
    n_routed_experts=3,
    max_position_embeddings=64,
    dropout=0.0,
    final_norm=True,
)
CROWDED = torch.tensor([1.0, 2.0, -9.0])  # a routing bias that sends every token to two experts and none to the third


@pytest.fixture(scope="module")
def weights():
    return random_weights(SMALL, seed=4)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def tokens(*shape: int) -> Tensor:
    return torch.randint(SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(sum(shape)))


def crowd(model: CustomLLM) -> None:
    for layer in model.decoder_layers:
        layer.mlp.routing_bias.copy_(CROWDED)


def assert_same_step(compiled, model: CustomLLM, eager: CustomLLM, ids: Tensor) -> None:
    """Logits and gradients of the compiled and the eager model agree within the float32 tolerance."""
    ours, theirs = compiled(ids, labels=ids), eager(ids, labels=ids)
    tolerance = TOLERANCES["float32"].forward
    logits = (out.logits.detach().numpy() for out in (theirs, ours))
    rows = [compare_arrays("logits", "logits", "", *logits, tolerance)]
    for out, compared in ((ours, model), (theirs, eager)):
        compared.zero_grad()
        out.loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        rows.append(compare_arrays("gradients", "gradients", name, theirs.grad.numpy(), ours.grad.numpy(), tolerance))
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]


@pytest.mark.slow  # by default with gradient checkpointing, and the exported program for every length
@pytest.mark.parametrize(
    ("backend", "dynamic", "shapes"),
    [("inductor", False, [(2, 9)]), ("aot_eager", True, [(2, 9), (3, 30)])],
    ids=["inductor", "every length in one graph"],
)
def test_one_graph_trains(weights, backend, dynamic, shapes):
    model, eager = torch_model(SMALL, weights).train(), torch_model(SMALL, weights).train()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in shapes:
            assert_same_step(compiled, model, eager, tokens(*shape))
        crowd(model)
        crowd(eager)
        assert_same_step(compiled, model, eager, tokens(*shapes[-1]))


@pytest.mark.slow
def test_one_graph_trains_with_gradient_checkpointing(weights):
    model, eager = torch_model(SMALL, weights).train(), torch_model(SMALL, weights).train()
    model.gradient_checkpointing_enable()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same_step(compiled, model, eager, tokens(2, 9))
        crowd(model)
        crowd(eager)
        assert_same_step(compiled, model, eager, tokens(2, 9))


@torch.no_grad()
def test_one_graph_evaluates(weights):
    model = torch_model(SMALL, weights)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        before = model(tokens(2, 9)).logits
        torch.testing.assert_close(compiled(tokens(2, 9)).logits, before, rtol=0, atol=1e-6)
        crowd(model)
        torch.testing.assert_close(compiled(tokens(2, 9)).logits, model(tokens(2, 9)).logits, rtol=0, atol=1e-6)
        assert not torch.equal(model(tokens(2, 9)).logits, before)


@torch.no_grad()
def test_a_graph_that_skips_experts_is_refused(weights, monkeypatch):
    """The control: eager evaluation skips experts without tokens, which cannot be one graph."""

    def skipping(rows, layers, plan, experts_per_token):
        groups = rows.index_select(0, plan.order // experts_per_token).split(plan.group_sizes)
        return torch.cat([layer(group) for layer, group in zip(layers, groups, strict=True) if len(group)])

    monkeypatch.setattr(reference, "run_experts", skipping)
    compiled = torch.compile(torch_model(SMALL, weights), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="data-dependent expression"):  # of dynamo or of its symbolic shapes
        compiled(tokens(2, 9))


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_an_exported_program_computes_the_same_logits(weights, tmp_path, masked):
    """Any batch and any length; saved, and loaded by a process that has nothing but torch."""
    model = torch_model(SMALL, weights)
    model.config.return_dict = False  # a tuple: a process that loads transformers' class would have to import it first
    axes = {0: Dim("batch", max=64), 1: Dim("time", max=SMALL.max_position_embeddings)}
    mask = torch.ones(2, 9, dtype=torch.int64) if masked else None
    program = torch.export.export(
        model, (tokens(2, 9), mask), dynamic_shapes={"input_ids": axes, "attention_mask": axes if masked else None}
    )
    torch.export.save(program, tmp_path / "model.pt2")

    inputs, wanted = [], []
    for shape in ((2, 9), (1, 1), (5, 64)):
        mask = torch.ones(shape, dtype=torch.int64) if masked else None
        if masked:
            mask[0, : shape[1] // 2] = 0
        inputs.append((tokens(*shape), mask))
        wanted.append(model(*inputs[-1])[0])
    torch.save(inputs, tmp_path / "inputs.pt")
    script = """
import torch
module = torch.export.load("model.pt2").module()
torch.save([module(*inputs)[0] for inputs in torch.load("inputs.pt")], "logits.pt")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(torch.load(tmp_path / "logits.pt"), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
