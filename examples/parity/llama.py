"""The Llama of `llama_nnx.py` beside transformers' LlamaForCausalLM. The mapping is proposed.

python -m parity_tests pair examples/parity/llama.py

With VARIANT=eps the port keeps its default eps of 1e-6 while the config says 1e-5; with VARIANT=theta its rope_theta.
"""

import os

import numpy as np

VARIANT = os.environ.get("VARIANT", "")
ids = np.random.default_rng(0).integers(0, 97, (2, 12))


def jax():
    import jax.numpy as jnp
    from flax import nnx
    from llama_nnx import Llama

    from parity_tests import nnx_side

    options = {"eps": 1e-6 if VARIANT == "eps" else 1e-5, "theta": 1e4 if VARIANT == "theta" else 5e5}
    return nnx_side(
        lambda: Llama(97, 32, 48, layers=2, heads=4, kv_heads=2, rngs=nnx.Rngs(0), **options),
        call=lambda m: m(jnp.asarray(ids)),
        logits=lambda m, ids, mask=None: m(ids, mask),
    )


def torch():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from parity_tests import TorchSide

    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_theta=5e5, tie_word_embeddings=False,
        attn_implementation="eager", max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip

    def logits(m, ids, mask=None):
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        return m(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits

    return TorchSide(lambda: LlamaForCausalLM(config), lambda m: logits(m, torch.from_numpy(ids)), logits=logits)
