"""The shapes that `jaxllm.model` and `jaxllm.train` declare hold while the model and the step are traced."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Tracing checks all shapes and needs no compilation. B, T, D, H, ... are different numbers.
CHECKED = """
from jaxtyping import install_import_hook

with install_import_hook(["jaxllm.model", "jaxllm.train"], "beartype.beartype"):
    import jaxllm.train.trainer
    from jaxllm.model.decoder import CustomLLM
    from jaxllm.model.inference import for_inference
    from jaxllm.train.computation import Computation

import dataclasses
import jax, jax.numpy as jnp
from flax import nnx
from jaxllm.config import PRESETS, TrainConfig
from jaxllm.model import attention
from jaxllm.model.kernels import causal_attention

def shapes_of(preset, **options):
    model = dataclasses.replace(PRESETS[preset], num_hidden_layers=3, vocab_size=71, **options.pop("model", {}))
    config = TrainConfig.from_options(preset=preset, model=model, seq_len=10, batch_size=5, **options)
    computation = Computation.of(config)
    state = jax.eval_shape(computation.init_state)
    _, metrics = jax.eval_shape(computation.train_step, state, computation.labels)
    assert metrics.loss.shape == ()
    rows = jax.ShapeDtypeStruct((5, 10), jnp.int32)
    jax.eval_shape(computation.eval_step, state.params, state.routing_bias, rows)

    def decode(params, bias, ids, mask):
        model = for_inference(nnx.merge(computation.graph, params, bias))
        model(ids)
        filled = model.hidden_states(ids, mask, keep_latents=True, keep_trace=True)
        return model.decode(ids[:, :1], ids[:, :1], filled.aux.latents)

    logits, _ = jax.eval_shape(decode, state.params, state.routing_bias, rows, rows)
    assert logits.shape == (5, 1, 71)

PLANT
shapes_of("tiny", precision="float32", optimizer="adamw", grad_accum=2, model={"dropout": 0.1})
shapes_of("tiny-deepseek", precision="bfloat16", optimizer="muon", remat=True, balance_loss=1e-3, router_z_loss=1e-3)
print("checked")
"""


def traced(plant: str) -> subprocess.CompletedProcess:
    program = CHECKED.replace("PLANT", plant)
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_declared_shapes_hold():
    done = traced("")
    assert done.stdout == "checked\n", done.stderr[-3000:]


@pytest.mark.parametrize(
    ("plant", "function"),
    [
        ("causal_attention.save_for_backward = lambda x: x.swapaxes(1, 2)", "blocked_attention"),
        ("attention.RotaryEmbedding.__call__ = lambda self, x, positions: x[:, 1:]", "latents"),
    ],
)
def test_a_planted_wrong_shape_is_found(plant, function):
    done = traced(plant)
    assert done.returncode == 1
    assert "TypeCheckError" in done.stderr
    assert function in done.stderr
