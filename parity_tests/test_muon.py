"""Muon in PyTorch: the iteration is that of JAX, the update that of torch.optim.Muon, and the parameters the same."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from convert.mapping import entries
from jaxllm.config import PRESETS
from jaxllm.model.decoder import model_facts
from jaxllm.train import muon as jax_muon
from parity_tests.compare import MUON_BFLOAT16, Row
from parity_tests.rounding import of_iteration
from torch_ref import muon
from torch_ref.step import is_hidden_matrix


def test_the_constants_are_those_of_jax():
    for name in ("NEWTON_SCHULZ", "STEPS", "EPS", "RMS"):
        assert getattr(muon, name) == getattr(jax_muon, name)


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (3, 32, 32)])
def test_the_iteration_is_that_of_jax(shape):
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    ours = jax_muon.newton_schulz(jnp.asarray(x), jnp.float32)
    np.testing.assert_allclose(muon.newton_schulz(torch.from_numpy(x), torch.float32).numpy(), ours, atol=5e-6)


@pytest.mark.parametrize("shape", [(16, 3, 64), (16, 64, 8), (16, 24, 60)])
def test_in_bfloat16_the_coefficients_are_not_rounded(shape):
    """Rounded to bfloat16 they change singular values near 1 by up to a tenth, as a factor of the whole update."""
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    u, _, v = np.linalg.svd(x, full_matrices=False)
    ours = np.asarray(jax_muon.newton_schulz(jnp.asarray(u @ v), jnp.bfloat16), np.float32)
    theirs = muon.newton_schulz(torch.from_numpy(u @ v), torch.bfloat16).float().numpy()
    sizes = [np.linalg.norm(side, axis=(1, 2)) for side in (ours, theirs)]
    np.testing.assert_allclose(*sizes, rtol=5e-3)


@pytest.mark.parametrize("name", ["tiny", "tiny-deepseek"])
def test_the_same_parameters_are_updated_as_in_jax(name):
    facts = flatten_dict(model_facts(PRESETS[name])[0])
    for entry in entries(PRESETS[name]):
        if entry.is_parameter:
            wanted = {facts[part.path].is_hidden_matrix for part in entry.parts}
            assert wanted == {is_hidden_matrix(entry.torch_name)}, entry.torch_name


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (32, 32)])
def test_an_update_is_that_of_torch_optim_muon(shape):
    """Which computes its norm in bfloat16 too: hence the tolerance, far below the effect of any fault."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    group = {"params": [ours], "momentum": 0.95, "weight_decay": 0.1}
    optimizers = (
        muon.MuonWithAdamW([group], torch.bfloat16, lr=0.02),
        torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(5):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    change, wanted = ((parameter - start).detach() for parameter in (ours, theirs))
    assert torch.linalg.vector_norm(change - wanted) < 0.03 * torch.linalg.vector_norm(wanted)


def test_rounding_never_explains_a_missing_update():
    """Also of a matrix of rank 1, all of whose other singular values are rounding."""
    argument = np.outer(*np.random.default_rng(0).standard_normal((2, 24))).astype(np.float32)
    row = Row("step", "update", "matrix", False, MUON_BFLOAT16.name, relative_l2=1.0)
    assert not of_iteration(row, argument).passed
