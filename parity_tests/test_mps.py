"""What Apple's MPS backend would run of the PyTorch model, checked without a Mac: see `parity_tests.mps_operators`.

Of MPS's known traps: PyTorch's own attention, which was wrong there with a mask broadcast over heads, NaN for a row
without keys and fatal with both a mask and `is_causal`, is never called; and no softmax runs over a row without keys.
"""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

import torch_ref.model as reference
from parity_tests import mps_runs
from parity_tests.mps_operators import mps_kernel
from torch_ref.step import make_optimizer, make_schedule, train_step

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the imitated device lives in Linux's libc10.so")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of tiny operators: handing them to threads takes longer than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_attention_of_torch(monkeypatch):
    def called(*args, **kwargs):
        pytest.fail("scaled_dot_product_attention was called")

    monkeypatch.setattr(F, "scaled_dot_product_attention", called)


@pytest.mark.parametrize("name", mps_runs.RUNS)
def test_mps_has_a_kernel_for_every_operator(name):
    recorder = mps_runs.RUNS[name]()
    assert not recorder.breaches, recorder.summary()
    assert {mps_kernel(operator) for operator in recorder.calls} >= {"MPS", "CompositeExplicitAutograd"}
    assert not [operator for operator in recorder.calls if operator.startswith(("_foreach", "_fused"))]


def eigenvalues(x):
    return x + 0 * torch.linalg.eigvalsh(torch.eye(2, device=x.device)).sum().to(x.dtype)


def renormed(x):
    rows = F.embedding(
        torch.zeros(1, dtype=torch.int64, device=x.device), torch.ones(2, 2, device=x.device), max_norm=1
    )
    return x + 0 * rows.sum().to(x.dtype)


def wide_scalar(x):
    return (x + torch.zeros((), dtype=torch.float64, device=x.device)).to(x.dtype)


PLANTED = {
    "_linalg_eigh": (eigenvalues, "has no MPS kernel"),
    "embedding_renorm_": (renormed, "has no MPS kernel"),  # one of those that fall back without a word
    "_to_copy": (lambda x: x.double().to(x.dtype), "has a float64 tensor"),
    "add.Tensor": (wide_scalar, "has a float64 tensor"),
    "complex": (lambda x: torch.complex(x.float(), x.float()).real.to(x.dtype), "has a complex64 tensor"),
}


@pytest.mark.parametrize("run", ["forward and backward, float32", "greedy generation"])
@pytest.mark.parametrize("operator", PLANTED)
def test_a_planted_fault_is_seen(monkeypatch, operator, run):
    plant, reason = PLANTED[operator]
    forward = reference.CustomRMSNorm.forward
    monkeypatch.setattr(reference.CustomRMSNorm, "forward", lambda self, x: plant(forward(self, x)))
    breaches = mps_runs.RUNS[run]().breaches
    assert any(name.startswith(operator) and why == reason for name, why in breaches.items()), breaches


@pytest.mark.parametrize("name", ["linalg_eig", "_linalg_eigh", "embedding_renorm_", "geqrf", "no_such_operator"])
def test_the_table_knows_what_mps_lacks(name):
    assert mps_kernel(name) is None


def test_the_table_follows_structured_operators_and_composites():
    assert (
        mps_kernel("mm") == mps_kernel("mm.out") == mps_kernel("add_.Tensor") == "MPS"
    )  # by way of mm.out and add.out
    # MPS runs nn.Linear whole, where the CPU has t, addmm and mm
    assert mps_kernel("linear") == mps_kernel("linear_backward") == "MPS"
    assert mps_kernel("ones_like") == mps_kernel("ones_like.out") == "CompositeExplicitAutograd"  # the latter autogen'd
    assert mps_kernel("dropout") == "CompositeImplicitAutograd"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_halves_of_a_recorded_step_agree(precision):
    """The same operators forward, with the same derivatives; and the step's parameters are those that a CPU gives."""
    whole, reference = mps_runs.gradients(precision)
    half, after = mps_runs.step(precision, reference)
    optimizer_s = {"addcdiv_", "addcmul_", "lerp_.Scalar", "mul_.Tensor", "reciprocal", "sqrt", "zeros_like"}
    assert set(half.calls) - set(whole.calls) <= optimizer_s | {"linalg_vector_norm", "sign"}
    for name in set(half.calls) & set(whole.calls):
        kernels = dict(line.split(": ", 1) for line in torch._C._dispatch_dump_table(f"aten::{name}").splitlines())
        assert kernels["AutogradMPS"] == kernels["AutogradCPU"], name

    config = mps_runs.train_config(precision)
    plain = mps_runs.model().train()
    optimizer = make_optimizer(plain, config)
    torch.manual_seed(0)
    train_step(plain, optimizer, make_schedule(optimizer, config), config, mps_runs.labels())
    before = mps_runs.model().state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, rtol=1e-5, atol=1e-7)
        assert not torch.equal(value, before[name]) or name.endswith("norm.weight"), name


def test_the_imitated_device_writes_what_the_cpu_writes():
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}):
        assert torch.equal(mps_runs.generation(**options)[1], mps_runs.generation(torch.Tensor.clone, **options)[1])


def test_no_dropout_is_recomputed():
    """Checkpointing on MPS restores the CPU's random numbers only: a layer that it recomputes may not draw any."""
    assert not hasattr(torch.mps, "_initialized")  # what torch.utils.checkpoint asks for before it saves the device's
    layers = mps_runs.model().decoder_layers
    assert not [module for module in layers.modules() if "Dropout" in type(module).__name__]


def test_no_softmax_runs_over_nothing(monkeypatch):
    """Also for rows that are nothing but padding."""
    seen = []

    def watched(scores, mask):
        seen.append(bool(mask.any(dim=-1).all()))
        return masked_softmax(scores, mask)

    masked_softmax = reference.masked_softmax
    monkeypatch.setattr(reference, "masked_softmax", watched)
    mps_runs.generation(do_sample=False)
    mps_runs.evaluation()
    assert seen
    assert all(seen)
