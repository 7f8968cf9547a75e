"""Any pair: taps, lifting, records, mappings, the judge and its planted faults."""

from __future__ import annotations

import dataclasses
import html
import html.parser
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from jaxllm.errors import UserError
from parity_tests import FunctionSide, Options, Record, RecordedSide, TorchSide, linen_side, nnx_side, pair, record, tap
from parity_tests.engine import logprobs
from parity_tests.engine.command import main
from parity_tests.engine.lift import Interpreter, meant
from parity_tests.engine.mapping import Entry, TensorMap, read_mapping, regroups
from parity_tests.engine.page import write_verdict
from parity_tests.engine.propose import propose, relations

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "parity"
QUICK = Options(faults=False, steps=1)
X = np.random.default_rng(0).standard_normal((3, 5, 6)).astype(np.float32)


def run(function, *args, lifted: bool = False):
    """Trace, then interpret: the results, and the interpreter."""
    with jax.enable_x64(lifted):
        closed = jax.make_jaxpr(function)(*args)
        interpreter = Interpreter(lifted)
        return [np.asarray(out) for out in interpreter.run(closed, jax.tree.leaves(args))], interpreter


# taps


def test_taps_survive_every_transformation():
    def block(x, w):
        return tap(jnp.tanh(x @ w), "block")

    def loss(w, ws):
        x = block(jnp.ones((2, 3)), w)
        x = jax.checkpoint(block)(x, w)
        x = jax.jit(block)(x, w)
        x = jax.vmap(lambda row: tap(row * 2, "row"), in_axes=1)(x)  # (3, 2): rows first
        x, _ = jax.lax.scan(jax.checkpoint(lambda c, w: (tap(jnp.sin(c @ w), "scanned"), None)), x.T, ws)
        return x.sum()

    w, ws = jnp.full((3, 3), 0.3), jnp.full((2, 3, 3), 0.1)
    _, interpreter = run(jax.value_and_grad(loss, argnums=(0, 1)), w, ws)
    names = ["block", "block#2", "block#3", "row", "scanned[0]", "scanned[1]"]
    assert list(interpreter.outputs) == names
    assert list(interpreter.gradients) == names
    assert interpreter.outputs["row"].shape == (3, 2)


def test_the_gradient_at_an_output_is_that_of_a_perturbation():
    def loss(w, change):
        x = tap(jnp.tanh(w) + change, "inner")
        return (x**3).sum() + x.sum()

    w = jnp.asarray([0.3, -0.2])
    wanted = jax.grad(loss, argnums=1)(w, jnp.zeros(2))
    _, interpreter = run(jax.value_and_grad(lambda w: loss(w, 0.0)), w)
    np.testing.assert_allclose(interpreter.gradients["inner"], wanted, rtol=1e-6)


def test_a_wrong_custom_gradient_is_kept():
    """Gradients are those that the user's rules give, not those of the function that they replace."""

    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, g: (3 * x * g,))
    (_, gradient), _ = run(jax.value_and_grad(square), jnp.asarray(2.0))
    assert gradient == 6


# lifting


def test_lifting_reaches_islands_of_float32():
    def gelu(x):
        x = x.astype(jnp.float32)
        inner = jnp.float32(0.044715) * x**3 + jnp.arange(3, dtype=jnp.float32) / 3
        return jnp.einsum("i,i->", jnp.tanh(inner), x, preferred_element_type=jnp.float32)

    x = np.asarray([0.3, -1.2, 0.7])
    wanted = (np.tanh(0.044715 * x**3 + np.arange(3) / 3) * x).sum()
    (lifted,), interpreter = run(gelu, x, lifted=True)
    assert abs(lifted - wanted) < 1e-15
    assert not interpreter.holes
    (naive,), _ = run(gelu, x.astype(np.float32))
    assert abs(naive - wanted) > 1e-9


@pytest.mark.parametrize("exact", [0.044715, 0.5**0.5, 2 / np.pi**0.5, -(24**-0.5), 1 / 7, 300.0])
def test_a_literal_is_what_somebody_wrote(exact):
    """Where a side is traced in float32, its constants are rounded already."""
    assert float(meant(np.asarray(np.float32(exact)))) == pytest.approx(exact, rel=1e-15)
    other = np.nextafter(np.float32(exact), np.float32(np.inf))
    assert float(meant(np.asarray(other))) == float(other)


def test_lifting_reaches_loops_branches_and_indexed_updates():
    def program(x):
        x, _ = jax.lax.scan(lambda c, y: (c * y, None), x[0], x)
        x = jax.lax.while_loop(lambda c: c < 10, lambda c: c * jnp.float32(3.1), jnp.abs(x) + 1)
        x = jax.lax.cond(x > 1, lambda c: c / 3, lambda c: c, x)
        return jnp.zeros(2, jnp.float32).at[jnp.asarray([0, 0])].add(x.astype(jnp.float32))

    (lifted,), _ = run(program, np.asarray([1.1, 0.7]), lifted=True)
    value = 1.1 * 1.1 * 0.7 + 1
    while value < 10:
        value *= 3.1
    np.testing.assert_allclose(lifted, [2 * value / 3, 0], rtol=1e-14)


def test_casts_below_float32_are_findings():
    _, interpreter = run(lambda x: tap(x.astype(jnp.bfloat16).astype(jnp.float32), "router"), jnp.ones(3))
    assert list(interpreter.findings) == ["router: convert_element_type to bfloat16"]


# pairs


class Attention(nn.Module):
    """With a bias of the keys, whose gradient is zero in theory."""

    def __init__(self, size: int, eps: float = 1e-5):
        super().__init__()
        self.norm = nn.LayerNorm(size, eps=eps)
        self.query, self.key, self.value, self.out = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x):
        x = self.norm(x)
        scores = self.query(x) @ self.key(x).mT / x.shape[-1] ** 0.5
        return self.out(scores.softmax(-1) @ self.value(x))


class JaxAttention(nnx.Module):
    def __init__(self, size, rngs, eps=1e-5, wide=jnp.float32):
        self.norm = nnx.LayerNorm(size, epsilon=eps, rngs=rngs)
        self.query, self.key, self.value, self.out = (nnx.Linear(size, size, rngs=rngs) for _ in range(4))
        self.wide = wide

    def __call__(self, x):
        x = self.norm(x)
        scores = self.query(x) @ self.key(x).swapaxes(-1, -2) / x.shape[-1] ** 0.5
        weights = jax.nn.softmax(scores.astype(self.wide), axis=-1).astype(x.dtype)
        return self.out(weights @ self.value(x))


def torch_attention(**options) -> TorchSide:
    return TorchSide(lambda: Attention(6, **options), lambda m: m(torch.from_numpy(X)))


def jax_attention(**options):
    return nnx_side(lambda: JaxAttention(6, nnx.Rngs(0), **options), lambda m: m(jnp.asarray(X)))


@pytest.fixture(scope="module")
def attention():
    return pair(jax_attention(), torch_attention())


def test_a_right_pair_agrees(attention):
    assert attention.agrees, attention.line()
    assert attention.judgement.lifted
    assert {row.rung for row in attention.rows} == {
        "weights", "modules", "results", "gradients", "step", "training", "rounding",
    }  # fmt: skip
    assert max(row.relative_l2 for row in attention.rows if row.rung == "modules") < 1e-12
    assert attention.mapping.entries["query.kernel"] == Entry("query.kernel", ("query.weight",), ("T",))
    assert not attention.mapping.without_jax
    assert not attention.mapping.without_torch


def test_a_gradient_that_is_zero_in_theory_stands_apart(attention):
    dead = [row.leaf for row in attention.rows if row.what == "gradient, zero in theory"]
    assert dead == ["key.bias"]


def test_planted_faults_are_seen_or_have_no_effect(attention):
    found = {control.fault: control for control in attention.controls}
    assert found["a square weight transposed"].kind == "seen"
    assert found["eps 1 % larger"].kind == "seen"
    assert found["a gradient 0.1 % larger at one module"][1:3] == ("seen", "gradients")
    assert found["an eps inside the root of the optimizer"][1:3] == ("seen", "step")
    assert found["one future token let through the mask"].kind == "no effect"
    assert found["two experts exchanged"].kind == "not applicable"
    assert not [control.fault for control in attention.controls if control.kind == "blind"]


def test_a_wrong_pair_is_refused_with_the_first_module():
    verdict = pair(jax_attention(eps=1e-6), torch_attention(), options=QUICK)
    assert not verdict.agrees
    assert (verdict.judgement.first.rung, verdict.first) == ("modules", "norm")
    verdict = pair(jax_attention(wide=jnp.bfloat16), torch_attention(), options=QUICK)
    assert verdict.first == "out"
    assert verdict.judgement.last_equal == "value"
    assert any("bfloat16" in finding for finding in verdict.judgement.findings)


def test_without_lifting_the_control_is_a_moved_parameter():
    options = dataclasses.replace(QUICK, lift=False)
    verdict = pair(jax_attention(), torch_attention(), options=options)
    assert verdict.agrees, verdict.line()
    assert "as far as their rounding tells" in verdict.line()
    assert pair(jax_attention(eps=1e-3), torch_attention(), options=options).first == "norm"


def test_one_side_that_cannot_be_lifted_is_enough():
    class Float32Only(TorchSide):
        def run(self, precision, **options):
            if precision == "lifted":
                raise NotImplementedError("grouped_mm has no float64")
            return super().run(precision, **options)

    side = Float32Only(lambda: Attention(6), lambda m: m(torch.from_numpy(X)))
    verdict = pair(jax_attention(), side, options=QUICK)
    assert verdict.agrees, verdict.line()
    assert "the torch side is not lifted to float64: NotImplementedError: grouped_mm has no float64" in " ".join(
        verdict.judgement.findings
    )
    assert pair(jax_attention(eps=1e-3), side, options=QUICK).first == "norm"


def test_a_fault_that_nothing_depends_on_is_an_invariance():
    """What no result and no gradient depends on cannot be seen: here a second layer, which is multiplied by zero."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.first(x) + 0 * self.second(x)

    side = TorchSide(Two, lambda m: m(torch.from_numpy(X)))
    ours = FunctionSide(lambda p: X.astype(p["w"].dtype) @ p["w"] + p["b"], {"w": np.zeros((6, 6), np.float32),
                                                                             "b": np.zeros(6, np.float32)})  # fmt: skip
    mapping = {"w": ("first.weight", "T"), "b": "first.bias"}
    verdict = pair(ours, side, mapping, dataclasses.replace(QUICK, faults=True))
    assert verdict.agrees, verdict.line()
    assert "second.weight" in " ".join(verdict.judgement.not_compared)
    # the fault is planted in the second module
    assert {c.fault: c.kind for c in verdict.controls}["a scale of 1.001 at one module"] == "invariance"


def test_statistics_of_a_batch_are_compared_in_training_mode():
    class Net(flax.linen.Module):
        momentum: float = 0.9

        @flax.linen.compact
        def __call__(self, x, train=False):
            x = flax.linen.Dense(6)(x)
            return flax.linen.BatchNorm(use_running_average=not train, momentum=self.momentum, epsilon=1e-5)(x)

    class Torch(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(self.dense(x))

    rows = X.reshape(-1, 6)
    side = TorchSide(Torch, lambda m: m(torch.from_numpy(rows)))

    def linen(**options):
        net = Net(**options)
        return linen_side(
            net,
            lambda: net.init(jax.random.key(0), rows),
            lambda apply: apply(rows),
            lambda apply: apply(rows, train=True),
        )

    verdict = pair(linen(), side, options=QUICK)
    wrong = [row for row in verdict.rows if not row.passed]
    # Flax keeps the biased variance, PyTorch the unbiased one
    assert [(row.rung, row.leaf) for row in wrong] == [("state", "batch_stats.BatchNorm_0.var")]
    assert wrong[0].relative_l2 > 1e-3
    wrong = [row.leaf for row in pair(linen(momentum=0.99), side, options=QUICK).rows if not row.passed]
    assert wrong == ["batch_stats.BatchNorm_0.mean", "batch_stats.BatchNorm_0.var"]


def test_tied_and_stacked_tensors():
    """PyTorch ties its head to the embedding; JAX has two tensors, and its layers in a scan."""
    ids = np.asarray([[1, 3, 2]])

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            x = self.embed(ids)
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return self.head(x)

    def function(p):
        def layer(x, q):
            return jnp.tanh(tap(x @ q["kernel"] + q["bias"], "layers")), None

        x, _ = jax.lax.scan(layer, tap(p["embed"][ids], "embed"), p["layers"])
        return x @ p["head"]

    params = {"embed": np.zeros((7, 4)), "layers": {"kernel": np.zeros((2, 4, 4)), "bias": np.zeros((2, 4))},
              "head": np.zeros((4, 7))}  # fmt: skip
    ours = FunctionSide(function, jax.tree.map(np.float32, params))
    mapping = {
        "embed": "embed.weight", "head": ("head.weight", "T"),
        "layers.kernel": ("layers.*.weight", "stack", "T"), "layers.bias": ("layers.*.bias", "stack"),
    }  # fmt: skip
    side = TorchSide(Tied, lambda m: m(torch.from_numpy(ids)))
    verdict = pair(ours, side, mapping, dataclasses.replace(QUICK, steps=0))
    assert verdict.agrees, verdict.line()
    assert "embed.weight" in {row.leaf for row in verdict.rows if row.rung == "gradients"}
    assert {"layers.0", "layers.1"} <= {row.leaf for row in verdict.rows if row.rung == "modules"}


# mappings


@pytest.mark.parametrize(
    ("ours", "theirs", "found"),
    [
        ((4, 6), (6, 4), [("T",)]),
        ((6, 6), (6, 6), [(), ("T",)]),
        ((3, 3, 2, 8), (8, 2, 3, 3), [("conv2d",)]),
        ((6, 2, 4), (8, 6), [("T",)]),
        ((2, 4, 6), (6, 8), [("T",)]),
        ((5,), (4,), []),
    ],
)
def test_how_shapes_can_be_related(ours, theirs, found):
    assert relations(ours, theirs) == found


def test_experts_in_one_tensor_are_proposed():
    """Names decide between shapes that both fit, and an element that no tensor of JAX has is named."""
    ours = {"moe.down": (3, 6, 4), "moe.up": (3, 4, 6), "moe.shift": (3, 5), "moe.square": (3, 4, 4)}
    of_an_expert = {"up": (6, 4), "down": (4, 6), "square": (4, 4), "x": (5,), "y": (5,)}
    theirs = {f"moe.experts.{i}.{name}.weight": shape for i in range(3) for name, shape in of_an_expert.items()}
    found = propose([], [], ours, theirs, {})
    assert {name: (entry.torch[2], entry.operations) for name, entry in found.entries.items()} == {
        "moe.down": ("moe.experts.2.down.weight", ("stack", "T")),
        "moe.up": ("moe.experts.2.up.weight", ("stack", "T")),
        "moe.square": ("moe.experts.2.square.weight", ("stack", "T")),
    }
    assert found.without_torch == ["moe.shift"]
    assert len(found.unsure) == 1
    assert found.unsure[0].startswith("moe.square")
    # as many layers as experts, a list of parameters, and heads that are split and exchanged
    ours = {"layers_1.moe.up": (3, 4, 6), "moe.shift": (3, 5), "attn.q.w": (3, 2, 8, 4), "foo.weight": (3, 7)}
    theirs = {f"layers.{i}.moe.experts.{j}.up.weight": (6, 4) for i in range(3) for j in range(3)}
    theirs |= {f"moe.shift.{i}": (5,) for i in range(3)} | {f"attn.{i}.q": (8, 8) for i in range(3)}
    theirs |= {f"bar.{i}.weight": (7,) for i in range(3)}
    found = propose([], [], ours, theirs, {})
    assert found.entries["layers_1.moe.up"].torch[2] == "layers.1.moe.experts.2.up.weight"
    assert found.entries["moe.shift"].torch == ("moe.shift.0", "moe.shift.1", "moe.shift.2")
    q = np.arange(192.0).reshape(3, 8, 8)
    made = found.entries["attn.q.w"].made([*q], (3, 2, 8, 4))
    np.testing.assert_array_equal(made[1], q[1].reshape(2, 4, 8).transpose(0, 2, 1))
    assert found.without_torch == ["foo.weight"]  # no word but the one that all have


def test_a_tensor_without_a_partner_ends_the_comparison():
    """Whole or in part: what follows would compare different weights."""

    class Bias(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[..., :3] * self.w[:3] + self.w[3:]

    theirs = TorchSide(Bias, lambda m: m(torch.from_numpy(X)))
    ours = FunctionSide(lambda params: jnp.asarray(X)[..., :3] * params["w"], {"w": np.ones(3, np.float32)})
    for mapping, said in (({}, "PyTorch trains it"), ({"w": ("w", ("part", 0, 0, 2))}, "3 of its 6 elements")):
        verdict = pair(ours, theirs, mapping, QUICK)
        assert {row.rung for row in verdict.rows} == {"weights"}
        assert f"The mapping is not complete: w has no partner ({said}" in verdict.line()
        assert "everything else, because the mapping is not complete" in verdict.judgement.not_compared


def test_a_function_may_compute_new_numbers():
    """Such as the other sign; whether it leaves an element out is then not known."""
    shapes = {"a": np.zeros((2, 3))}
    for function in (np.negative, lambda w: 2 * w, lambda w: np.exp(w).astype(np.float32), np.linalg.inv):
        mapped = TensorMap({"x": Entry("x", ("a",), (function,))})
        assert mapped.partly({"x": np.zeros((2, 3))}, shapes) == {}
    found = TensorMap({"x": Entry("x", ("a",), (lambda w: w[:1],))}).partly({"x": np.zeros((1, 3))}, shapes)
    assert found["a"].tolist() == [[False] * 3, [True] * 3]


def test_a_reshape_only_splits_and_merges():
    assert regroups((6, 8), (6, 2, 4))
    assert regroups((2, 3, 4), (6, 4))
    assert not regroups((2, 3, 4), (4, 6))
    assert not regroups((4, 6), (6, 4))


def test_operations_of_a_mapping():
    a, b = np.arange(6.0).reshape(2, 3), np.arange(6.0, 12).reshape(2, 3)
    assert Entry("x", ("a", "b"), (("join", 0), "T")).made([a, b], (3, 4)).tolist() == np.vstack([a, b]).T.tolist()
    assert Entry("x", ("a",), (("part", 1, 2, 3),)).made([a], (2,)).tolist() == [2, 5]
    assert Entry("x", ("a",), (("take", 0, [1, 0]),)).made([a], (2, 3)).tolist() == a[::-1].tolist()
    assert Entry("x", ("a",), (("flip", (0, 1)),)).made([a], (2, 3)).tolist() == a[::-1, ::-1].tolist()
    assert Entry("x", ("a",), (("add", 1),)).made([a], (2, 3), linear=True).tolist() == a.tolist()
    assert Entry("x", ("a",), (lambda w: w.T,)).made([a], (3, 2)).tolist() == a.T.tolist()


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"y": "a"}, "JAX side has no tensor 'y'"),
        ({"x": "b"}, "PyTorch side has no tensor 'b'"),
        ({"x": ("a", "transposed")}, "'transposed' is not an operation"),
        ({"x": ("a", ("part", 0, 1, 5))}, "is not possible"),
        ({"x": "a"}, "of shape [2, 3] becomes [2, 3], and JAX has [3, 2]"),
        ({"x": ("a.*", "stack")}, "no tensor of the PyTorch side is called a.*"),
    ],
)
def test_a_wrong_mapping_is_refused_in_one_line(mapping, said):
    with pytest.raises(UserError, match=r"\w") as error:
        read_mapping(mapping, {"x": (3, 2)}, {"a": (2, 3)}, {})
    assert said in str(error.value)
    assert "\n" not in str(error.value)


# records


def test_a_record_holds_what_was_compared(tmp_path, attention):
    torch_record = record(torch_attention(), QUICK)
    torch_record.write(tmp_path / "torch.rec")
    read = Record.read(tmp_path / "torch.rec")
    assert list(read.runs["lifted"].outputs) == ["norm", "query", "key", "value", "out", "(root)"]
    for name, values in torch_record.runs["lifted"].grads.items():
        assert np.array_equal(read.runs["lifted"].grads[name], values)
    verdict = pair(jax_attention(), RecordedSide(tmp_path / "torch.rec"), options=QUICK)
    assert verdict.agrees, verdict.line()
    assert "planted faults: the PyTorch side is a record" not in " ".join(attention.judgement.not_compared)


def test_the_weights_of_a_record_in_jax_reach_pytorch(tmp_path):
    record(jax_attention(), QUICK).write(tmp_path / "jax.rec")
    verdict = pair(RecordedSide(tmp_path / "jax.rec"), torch_attention(), options=QUICK)
    assert verdict.agrees, verdict.line()


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}", b"PK\x03\x04"])
def test_a_file_that_is_no_record_is_refused(tmp_path, content):
    (tmp_path / "a.rec").write_bytes(content)
    with pytest.raises(UserError, match="record"):
        Record.read(tmp_path / "a.rec")


PAIR = """
import numpy as np
x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
def jax():
    import jax.numpy as jnp
    from parity_tests import FunctionSide
    params = {"w": np.zeros((4, 2), np.float32), "b": np.zeros(2, np.float32)}
    return FunctionSide(lambda p: jnp.asarray(x, p["w"].dtype) @ p["w"] + FACTOR * p["b"], params)
def torch():
    from torch import from_numpy, nn
    from parity_tests import TorchSide
    return TorchSide(lambda: nn.Linear(4, 2), lambda m: m(from_numpy(x)))
mapping = {"w": ("weight", "T"), "b": "bias"}
"""


def hidden(packages: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """A command where packages are not installed."""
    path = os.pathsep.join([str(ROOT / "tests" / "hiding"), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "parity_tests", *arguments],
        cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, "HIDDEN": packages},
    )  # fmt: skip


def test_each_side_runs_where_the_other_framework_is_not(tmp_path):
    (tmp_path / "my_pair.py").write_text(PAIR.replace("FACTOR", "1"))
    of_jax, of_torch = "jax jaxlib flax optax orbax equinox", "torch transformers"
    made = hidden(of_jax, "record", "my_pair.py", "--side", "torch", "--out", "torch.rec", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    made = hidden(
        of_torch, "record", "my_pair.py", "--side", "jax", "--weights", "torch.rec", "--out", "jax.rec", cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    compared = hidden(f"{of_jax} {of_torch}", "compare", "torch.rec", "jax.rec", "--out", "out", cwd=tmp_path)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert compared.stdout.splitlines()[-1] == "The two sides agree."


# the command


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.references, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.references += [value for name, value in attrs if name in ("src", "href", "action")]
        assert tag not in ("script", "link", "img", "iframe")

    def handle_data(self, data):
        self.text.append(data)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome is installed")
def test_a_browser_shows_the_page_without_a_network(attention, tmp_path):
    file = write_verdict(attention, tmp_path, "python -m parity_tests pair my_pair.py")["page"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", profile, offline, "--dump-dom", file.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert f'<h1 class="ok">{html.escape(attention.lines()[0])}</h1>' in shown
    assert shown.count('class="error"') == sum(row.relative_l2 is not None for row in attention.rows)


def test_the_command_names_what_differs(tmp_path, capsys):
    (tmp_path / "my_pair.py").write_text(PAIR.replace("FACTOR", "1.001"))
    assert main(["pair", str(tmp_path / "my_pair.py"), "--steps", "1", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("The two sides differ, first in: result result (rung results), by ")
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert (card["agrees"], card["verdict"]) == (False, said)
    assert card["rows"]
    assert len(card["pair"]["sha256"]) == 64
    page = Page()
    page.feed((tmp_path / "out" / "parity.html").read_text())
    assert page.references == []
    assert said in page.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pair", "nowhere.py"], "file is 'nowhere.py'"),
        (["pair", "my_pair.py", "--steps", "-1"], "steps is -1: it must be at least 0"),
        (["pair", "my_pair.py", "--torch", "nowhere.rec"], "cannot read nowhere.rec"),
        (["compare", "my_pair.py", "my_pair.py"], "my_pair.py is not a"),
        (["pair", "empty.py"], "empty.py defines no side 'jax'"),
        (["pair", "needy.py"], "needy.py needs no_such_package"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my_pair.py").write_text(PAIR.replace("FACTOR", "1"))
    Path("empty.py").write_text("")
    Path("needy.py").write_text("import no_such_package\n")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


# log-probabilities and batches


@pytest.mark.parametrize(
    "line",
    [
        {"tokens": [1, 2, 3], "logprobs": [None, -1.0, -2.0]},
        {"prompt_token_ids": [1, 2, 3], "prompt_logprobs": [None, {"2": {"logprob": -1.0}}, {"3": {"logprob": -2.0}}]},
        {"input_token_logprobs": [[None, 1, None], [-1.0, 2, None], [-2.0, 3, None]]},
        {"tokens": [1], "completion_probabilities": [{"id": 2, "logprob": -1.0}, {"id": 3, "logprob": -2.0}]},
    ],
)
def test_log_probabilities_of_each_engine(tmp_path, line):
    (tmp_path / "engine.jsonl").write_text(json.dumps(line) + "\n")
    (scored,) = logprobs.read_logprobs(tmp_path / "engine.jsonl")
    assert scored.tokens == [1, 2, 3]
    assert scored.logprobs == [None, -1.0, -2.0]


def test_log_probabilities_are_compared():
    table = np.log(np.asarray([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]]))

    class Engine:
        framework = "torch"

        def call_logits(self, precision, ids):
            return table[ids] + 7.0

    text = logprobs.Scored([0, 1, 2], [None, float(np.log(0.25)), float(np.log(0.8))], [None, 0, 1])
    (row,) = logprobs.logprob_rows(Engine(), [text])
    assert row.passed
    assert row.max_error < 1e-12
    assert "1 of 2 top tokens changed" in row.note
    (row,) = logprobs.logprob_rows(Engine(), [text._replace(logprobs=[None, -3.0, -0.2])])
    assert not row.passed


def test_a_padded_batch_that_is_not_masked_is_seen():
    class Sum(nn.Module):
        """Each position sees the mean of those before it; without the mask, padding too."""

        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 4)

        def forward(self, ids, mask=None, masked=True):
            x = self.embed(ids)
            seen = torch.ones_like(ids) if mask is None or not masked else mask
            total = (x * seen[..., None]).cumsum(1)
            return total / seen.cumsum(1).clamp(min=1)[..., None]

    from parity_tests.engine.batch import batch_rows

    ids = torch.arange(6).reshape(2, 3)
    side = TorchSide(Sum, lambda m: m(ids), logits=lambda m, ids, mask=None: m(ids, mask))
    assert all(row.passed for row in batch_rows(side, True))
    side.logits = lambda m, ids, mask=None: m(ids, mask, masked=False)
    assert [row.what for row in batch_rows(side, True) if not row.passed] == ["padded on the left"]


# the examples


@pytest.mark.parametrize(("variant", "first"), [("adamw", None), ("defaults", "update w")])
def test_the_smallest_example(variant, first, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VARIANT", variant)
    assert main(["pair", str(EXAMPLES / "optimizers.py"), "--out", str(tmp_path)]) == (first is not None)
    said = capsys.readouterr().out.splitlines()[-1]
    assert ("The two sides agree." if first is None else f"first in: {first} (rung") in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant", "first"),
    [
        ("optimizers", "nesterov", None),
        ("optimizers", "rmsprop_outside", None),
        ("optimizers", "rmsprop", "update w"),
        ("llama", "", None),
        ("llama", "eps", "output model.layers.0.input_layernorm"),
        ("llama", "theta", "output model.layers.0.self_attn.o_proj"),
        ("gpt2_flaxmodels", "gelu_new", None),
        ("gpt2_flaxmodels", "gelu", "output h.0.mlp.c_proj"),
        ("llama_tunix", "1000000", None),
        ("llama_tunix", "500000", "output model.layers.0.self_attn.o_proj"),
    ],
)
def test_an_example(name, variant, first, tmp_path):
    for package in {"gpt2_flaxmodels": ["flaxmodels"], "llama_tunix": ["tunix"]}.get(name, []):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "parity_tests", "pair", str(EXAMPLES / f"{name}.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VARIANT": variant})
    said = done.stdout.splitlines()[-1]
    if first is None:
        assert (done.returncode, said) == (0, "The two sides agree."), done.stdout + done.stderr
        assert ": blind" not in done.stdout
    else:
        assert done.returncode == 1, done.stdout + done.stderr
        assert f"first in: {first} (rung" in said
