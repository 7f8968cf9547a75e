"""The shapes that `jaxllm.model` and `jaxllm.train` declare hold while the model and the step are traced."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# The hook must precede the imports, hence the separate process. Tracing alone checks all shapes. B, T, D, H, ... are
# different numbers.
PROGRAM = """
from jaxtyping import TypeCheckError, install_import_hook

with install_import_hook(["jaxllm.model", "jaxllm.train"], "beartype.beartype"):
    import jaxllm.train.trainer
    from jaxllm.model import attention, decoding, inference
    from jaxllm.model.kernels import causal_attention
    from jaxllm.train.computation import Computation

import dataclasses
import jax, jax.numpy as jnp
from flax import nnx
from jaxllm.config import PRESETS, TrainConfig

def trace(preset, length=10, **options):
    model = dataclasses.replace(PRESETS[preset], num_hidden_layers=3, vocab_size=71, **options.pop("model", {}))
    config = TrainConfig.from_options(preset=preset, model=model, seq_len=length, batch_size=5, **options)
    computation = Computation.of(config)
    state = jax.eval_shape(computation.init_state)
    jax.eval_shape(computation.train_step, state, computation.batch, computation.numbers)
    rows = jax.ShapeDtypeStruct((5, length), jnp.int32)
    micro_batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), computation.batch)
    jax.eval_shape(computation.eval_step, state.params, state.routing_bias, micro_batch)

    def decode(params, bias, ids, mask):
        model = inference.for_inference(nnx.merge(computation.graph, params, bias))
        filled = model.hidden_states(ids, mask, keep_latents=True, keep_trace=True)
        return model(ids), model.decode(ids[:, :1], ids[:, :1], filled.aux.latents)

    jax.eval_shape(decode, state.params, state.routing_bias, rows, rows)

trace("tiny", precision="float32", optimizer="adamw", grad_accum=2, model={"dropout": 0.1})
trace("tiny-deepseek", precision="bfloat16", optimizer="muon", remat=True, balance_loss=1e-3, documents="separate")
print("the shapes hold")

for module, name, wrong in (
    (causal_attention, "save_for_backward", lambda x: x.swapaxes(1, 2)),
    (attention.RotaryEmbedding, "__call__", lambda self, x, positions: x[:, 1:]),
):
    right = getattr(module, name)
    setattr(module, name, wrong)
    try:
        trace("tiny", length=9)
    except TypeCheckError as error:
        print("found:", str(error).splitlines()[0])
    setattr(module, name, right)
"""


@pytest.mark.slow
def test_the_declared_shapes_hold_and_planted_wrong_ones_are_found():
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    held, *found = done.stdout.splitlines() or [""]
    assert held == "the shapes hold", done.stderr[-3000:]
    assert len(found) == 2
    assert "blocked_attention" in found[0]
    assert "MultiHeadLatentAttention.queries" in found[1]
