"""The operators of the PyTorch model on Apple's MPS backend, checked without a Mac: see `parity_tests.mps_operators`.

Known problems of MPS are avoided. PyTorch's scaled_dot_product_attention is never called: on MPS it was wrong for a
mask broadcast over heads, NaN for a row without keys, and crashed with both a mask and `is_causal`. No softmax runs
over a row without keys.
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

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the imitated device needs libc10.so of Linux")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For thousands of tiny operators, several threads are slower than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_scaled_dot_product_attention(monkeypatch):
    def called(*args, **kwargs):
        pytest.fail("scaled_dot_product_attention was called")

    monkeypatch.setattr(F, "scaled_dot_product_attention", called)


@pytest.mark.parametrize("name", mps_runs.RUNS)
def test_mps_has_a_kernel_for_every_operator(name):
    recorder = mps_runs.RUNS[name]()
    assert not recorder.breaches, recorder.summary()
    assert {mps_kernel(operator) for operator in recorder.calls} >= {"MPS", "CompositeExplicitAutograd"}
    assert not [operator for operator in recorder.calls if operator.startswith(("_foreach", "_fused"))]


def only_on_the_cpu(x):
    return x + 0 * torch._foobar(torch.ones(2, device=x.device)).sum().to(x.dtype)


def renormed(x):
    rows = F.embedding(
        torch.zeros(1, dtype=torch.int64, device=x.device), torch.ones(2, 2, device=x.device), max_norm=1
    )
    return x + 0 * rows.sum().to(x.dtype)


def float64_scalar(x):
    return (x + torch.zeros((), dtype=torch.float64, device=x.device)).to(x.dtype)


PLANTED = {
    "_foobar": (
        only_on_the_cpu,
        "has no MPS kernel",
    ),  # PyTorch's own, for tests; MPS gets more of the others each time
    "embedding_renorm_": (renormed, "has no MPS kernel"),  # one of those that fall back silently
    "_to_copy": (lambda x: x.double().to(x.dtype), "has a float64 tensor"),
    "add.Tensor": (float64_scalar, "has a float64 tensor"),
    "complex": (lambda x: torch.complex(x.float(), x.float()).real.to(x.dtype), "has a complex64 tensor"),
}


@pytest.mark.parametrize("run", ["forward and backward, float32", "greedy generation"])
@pytest.mark.parametrize("operator", PLANTED)
def test_a_planted_fault_is_detected(monkeypatch, operator, run):
    plant, reason = PLANTED[operator]
    forward = reference.CustomRMSNorm.forward
    monkeypatch.setattr(reference.CustomRMSNorm, "forward", lambda self, x: plant(forward(self, x)))
    breaches = mps_runs.RUNS[run]().breaches
    assert any(name.startswith(operator) and why == reason for name, why in breaches.items()), breaches


@pytest.mark.parametrize(
    "name", ["_foobar", "_scaled_dot_product_flash_attention_for_cpu", "embedding_renorm_", "no_such_operator"]
)
def test_operators_without_an_mps_kernel_are_known(name):
    assert mps_kernel(name) is None


def test_the_table_follows_structured_operators_and_composites():
    assert mps_kernel("mm") == mps_kernel("mm.out") == mps_kernel("add_.Tensor") == "MPS"  # through mm.out and add.out
    # MPS has one kernel for nn.Linear, the CPU uses t, addmm and mm
    assert mps_kernel("linear") == mps_kernel("linear_backward") == "MPS"
    assert mps_kernel("ones_like") == mps_kernel("ones_like.out") == "CompositeExplicitAutograd"  # the latter: autogen
    assert mps_kernel("dropout") == "CompositeImplicitAutograd"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_halves_of_a_recorded_step_agree(precision):
    """The forward operators and their derivatives are the same, and the step gives the parameters of a CPU step."""
    whole, reference = mps_runs.gradients(precision)
    half, after = mps_runs.step(precision, reference)
    optimizer_s = {"addcdiv_", "addcmul_", "lerp_.Scalar", "mul_.Tensor", "reciprocal", "sqrt", "zeros_like"}
    assert set(half.calls) - set(whole.calls) <= optimizer_s | {"linalg_vector_norm", "sign"}
    for name in set(half.calls) & set(whole.calls):
        kernels = dict(line.split(": ", 1) for line in torch._C._dispatch_dump_table(f"aten::{name}").splitlines())
        assert kernels["AutogradMPS"] == kernels["AutogradCPU"], name

    config = mps_runs.train_config(precision)
    plain = mps_runs.model().train()
    optimizer = make_optimizer(plain, config.optim, config.precision)
    torch.manual_seed(0)
    schedule = make_schedule(optimizer, config.schedule, config.optim.learning_rate)
    train_step(plain, optimizer, schedule, config.optim, config.precision, mps_runs.labels())
    before = mps_runs.model().state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, rtol=1e-5, atol=1e-7)
        assert not torch.equal(value, before[name]) or name.endswith("norm.weight"), name


def test_the_imitated_device_generates_the_tokens_of_the_cpu():
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}):
        assert torch.equal(mps_runs.generation(**options)[1], mps_runs.generation(torch.Tensor.clone, **options)[1])


def test_no_dropout_is_recomputed():
    """On MPS, checkpointing restores only the CPU's random state, so a recomputed layer must not use dropout."""
    assert not hasattr(torch.mps, "_initialized")  # torch.utils.checkpoint requires it to save the device's state
    layers = mps_runs.model().decoder_layers
    assert not [module for module in layers.modules() if "Dropout" in type(module).__name__]


def test_no_softmax_runs_over_an_empty_row(monkeypatch):
    """Not even for rows that contain only padding."""
    seen = []

    def watched(scores, mask):
        seen.append(bool((mask == 0).any(dim=-1).all()))
        return masked_softmax(scores, mask)

    masked_softmax = reference.masked_softmax
    monkeypatch.setattr(reference, "masked_softmax", watched)
    mps_runs.generation(do_sample=False)
    mps_runs.evaluation()
    assert seen
    assert all(seen)
