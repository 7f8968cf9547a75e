"""flaxmodels' GPT-2 (linen) beside transformers' GPT2Model. The mapping is proposed.

pip install --no-deps flaxmodels==0.1.3 && pip install h5py regex requests
python -m parity_tests pair examples/parity/gpt2_flaxmodels.py

With VARIANT=gelu the two differ, first in h.0.mlp.c_proj: flaxmodels computes the tanh form of GELU for `gelu`.
"""

import os
from types import SimpleNamespace

import numpy as np

ids = np.random.default_rng(0).integers(0, 97, (2, 11))
config = {
    "vocab_size": 97, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": None,
    "layer_norm_epsilon": 1e-5, "activation_function": os.environ.get("VARIANT", "gelu_new"),
    "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip


def jax():
    import jax
    import jax.numpy as jnp

    from parity_tests import linen_side

    reshape = jnp.reshape  # flaxmodels uses an argument that JAX has dropped
    jnp.reshape = lambda a, shape=None, newshape=None, **options: reshape(a, newshape or shape, **options)
    from flaxmodels.gpt2 import GPT2Model

    model = GPT2Model(config=SimpleNamespace(**config, scale_attn_weights=True))
    return linen_side(
        model, lambda: model.init(jax.random.key(0), ids), call=lambda apply: apply(ids)["last_hidden_state"]
    )


def torch():
    import torch
    from transformers import GPT2Config, GPT2Model

    from parity_tests import TorchSide

    return TorchSide(
        make=lambda: GPT2Model(GPT2Config(**config, bos_token_id=0, eos_token_id=0, attn_implementation="eager")),
        call=lambda m: m(torch.from_numpy(ids), use_cache=False).last_hidden_state,
    )
