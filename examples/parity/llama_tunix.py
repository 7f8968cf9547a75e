"""google-tunix's Llama3 (NNX) beside transformers' LlamaForCausalLM. The mapping is proposed.

pip install --no-deps google-tunix==0.1.7 && pip install jaxtyping
python -m parity_tests pair examples/parity/llama_tunix.py

With VARIANT=500000, the rope_theta of Llama 3, the two differ, first in model.layers.0.self_attn.o_proj: tunix 0.1.7
never uses its config's rope_theta, and computes with 1e6.
"""

import importlib.util
import os
import sys
import types

import numpy as np

THETA = int(os.environ.get("VARIANT", "1000000"))
ids = np.random.default_rng(0).integers(0, 97, (2, 12))


def jax():
    import jax.numpy as jnp
    from flax import nnx

    from parity_tests import nnx_side

    home = importlib.util.find_spec("tunix").submodule_search_locations  # the model alone, without tunix's dependencies
    for name in ("tunix", "tunix.generate", "tunix.generate.mappings"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = list(home) if name == "tunix" else []
    sys.modules["tunix.generate.mappings"].BackendMappingMixin = type("Mixin", (), {})
    from tunix.models.llama3.model import Llama3, ModelConfig

    config = ModelConfig(
        num_layers=2, vocab_size=97, embed_dim=32, hidden_dim=48, num_heads=4, head_dim=8, num_kv_heads=2,
        rope_theta=THETA, norm_eps=1e-5, weight_tying=False,
    )  # fmt: skip
    positions, mask = jnp.tile(jnp.arange(12), (2, 1)), jnp.tile(jnp.tril(jnp.ones((12, 12), bool)), (2, 1, 1))
    return nnx_side(lambda: Llama3(config, rngs=nnx.Rngs(0)), lambda m: m(jnp.asarray(ids), positions, None, mask)[0])


def torch():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from parity_tests import TorchSide

    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_theta=THETA, tie_word_embeddings=False,
        attn_implementation="eager", max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return TorchSide(lambda: LlamaForCausalLM(config), lambda m: m(torch.from_numpy(ids), use_cache=False).logits)
