"""The PyTorch model: the module tree of the source, the folders of both frameworks, causality, generation."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from jaxllm import PRESETS, ModelConfig, from_pretrained, save_pretrained
from jaxllm.model.decoder import abstract_model, split_model
from jaxllm.model.decoding import generate
from jaxllm.model.summary import module_tree
from parity_tests.compare import TOLERANCES, compare_arrays, compare_bits
from parity_tests.forward import jax_trace, random_weights, state_dict_arrays, torch_model, torch_named, torch_trace
from torch_ref import CustomLLM

SMALL = ModelConfig(
    vocab_size=311,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    moe_intermediate_size=32,
    max_position_embeddings=256,
    final_norm=True,
    eos_token_id=0,
    bos_token_id=0,
    pad_token_id=0,
)


@jax.jit
def logits_of(model, *args) -> jax.Array:
    return model(*args)


@pytest.fixture(scope="module")
def weights():
    return random_weights(SMALL, seed=4)


@pytest.mark.parametrize(("name", "count"), [("customllm-1b", 1_075_060_736), ("customllm-768", 793_921_536)])
def test_presets_have_exactly_their_parameters(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in CustomLLM(PRESETS[name]).parameters()) == count


def test_both_trees_are_those_of_the_source():
    with torch.device("meta"):
        tree = str(CustomLLM(PRESETS["customllm-1b"]))
    assert module_tree(PRESETS["customllm-1b"]) == tree
    page = Path(__file__).parents[2] / "shared" / "seed" / "customllm.md"
    if page.is_file():  # the tree that the source prints, if the page is next to the checkout
        text = page.read_text()
        start = text.index("CustomLLM(\n")
        assert tree == text[start : text.index("```", start)].strip().replace("LlamaMLP", "DeepSeekMoE")
    lines = tree.splitlines()
    assert lines[1] == "  (token_embeddings): Embedding(49152, 1024)"
    assert "    (0-23): 24 x DecoderLayer(" in lines
    assert lines[-2] == "  (lm_head): Linear(in_features=1024, out_features=49152, bias=True)"


def test_changing_a_token_changes_no_logit_before_it(weights):
    model = torch_model(SMALL, weights, "float64")
    ids = np.random.default_rng(0).integers(311, size=(2, 60))
    before = torch_trace(model, ids)
    for t in (1, 30, 59):
        changed = ids.copy()
        changed[:, t] = (changed[:, t] + 1) % 311
        free = torch_trace(model, changed).logits
        held = torch_trace(model, changed, experts=before.experts).logits
        scale = np.abs(before.logits).max()
        assert np.abs(free[:, :t] - before.logits[:, :t]).max() <= 1e-12 * scale
        np.testing.assert_array_equal(held[:, :t], before.logits[:, :t])
        assert np.abs(free[:, t:] - before.logits[:, t:]).max() > 1e-4 * scale


@pytest.mark.slow  # the ladder's rung `generation` compares the frameworks, tests/clients the cache
def test_greedy_generation_agrees_cached_and_uncached_and_across_frameworks(weights):
    config = dataclasses.replace(SMALL, eos_token_id=None)
    model = torch_model(config, weights)
    prompt = torch.tensor([[5, 17, 300]])
    options = {"do_sample": False, "max_new_tokens": 200, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    cached = model.generate(prompt, use_cache=True, **options)[0, 3:].tolist()
    uncached = model.generate(prompt, use_cache=False, **options)[0, 3:].tolist()
    flax = nnx.merge(abstract_model(config)[0], weights.params, weights.routing_bias)
    assert len(cached) == 200
    assert cached == uncached
    assert generate(flax, [prompt[0].tolist()], 200)[0] == cached


def test_padding_agrees(weights):
    """Left and right padding. What the models compute at the padding itself has no meaning, and differs."""
    ids = np.random.default_rng(1).integers(311, size=(2, 20), dtype=np.int32)
    mask = np.ones((2, 20), np.int32)
    mask[0, :6] = 0
    mask[1, 15:] = 0
    flax = nnx.merge(abstract_model(SMALL)[0], weights.params, weights.routing_bias)
    ours = np.asarray(logits_of(flax, ids, mask))
    with torch.no_grad():
        theirs = torch_model(SMALL, weights)(torch.tensor(ids).long(), attention_mask=torch.tensor(mask)).logits.numpy()
    real = mask == 1
    assert compare_arrays("", "logits", "", ours[real], theirs[real], TOLERANCES["float32"].forward).passed
    other = np.asarray(logits_of(flax, np.where(real, ids, 7), mask))
    np.testing.assert_array_equal(ours[real], other[real])
    assert np.isfinite(ours).all()
    assert np.isfinite(theirs).all()


def assert_same_weights(weights, model) -> None:
    rows = compare_bits("", "", torch_named(SMALL, *weights), state_dict_arrays(model))
    assert [row for row in rows if not row.passed] == []


def test_what_one_framework_saves_the_other_loads(weights, tmp_path):
    flax = nnx.merge(abstract_model(SMALL)[0], weights.params, weights.routing_bias)
    save_pretrained(flax, tmp_path / "from_flax")
    torch_side = CustomLLM.from_pretrained(tmp_path / "from_flax")
    assert_same_weights(weights, torch_side)
    torch_side.save_pretrained(tmp_path / "from_torch")
    written = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("from_flax", "from_torch")]
    for key in ("auto_map", "architectures", "use_cache", "transformers_version", "pad_token_id"):
        assert written[0][key] == written[1][key], key
    back = from_pretrained(tmp_path / "from_torch")
    assert back.config == SMALL
    params, routing_bias = split_model(back)[1:]
    assert_same_weights((params, routing_bias), torch_side)


def test_labels_are_shifted_once(weights):
    model = torch_model(SMALL, weights, "float64")
    ids = np.random.default_rng(2).integers(311, size=(3, 30))
    tokens = torch.tensor(ids)
    log_p = model(tokens).logits.log_softmax(-1)
    wanted = -log_p[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
    assert model(tokens, labels=tokens).loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert jax_trace(SMALL, weights, ids, "float64").loss == pytest.approx(wanted.item(), rel=1e-12)


def test_an_exported_folder_works_where_this_project_is_not_installed(weights, tmp_path):
    """Auto classes and the pipeline, in a process that cannot import this project."""
    from jaxllm.config.groups import DataConfig
    from jaxllm.data.sources import open_source
    from jaxllm.data.tokenizer import train_tokenizer

    (tmp_path / "text.txt").write_text("def f(x): return x\n" * 500)
    flax = nnx.merge(abstract_model(SMALL)[0], weights.params, weights.routing_bias)
    save_pretrained(flax, tmp_path / "model")
    source = open_source(DataConfig(source=str(tmp_path / "text.txt")), 0)
    train_tokenizer(source, 300).save_pretrained(tmp_path / "model")
    script = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jaxllm", "torch_ref", "convert", "parity_tests", "jax", "flax"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM, pipeline
folder = {str(tmp_path / "model")!r}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
print(repr(model(torch.arange(20)[None]).logits.sum().item()))
writer = pipeline("text-generation", model=folder, trust_remote_code=True)
print(len(writer("def ", max_new_tokens=5, do_sample=False)[0]["generated_text"]) > 4)
"""
    environment = {"HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    total, generated = done.stdout.split()[-2:]
    ours = np.asarray(logits_of(flax, np.arange(20)[None])).sum()
    assert float(total) == pytest.approx(float(ours), rel=1e-3)
    assert generated == "True"
