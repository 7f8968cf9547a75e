"""The self-check of kernels, with kernels that fail, differ, or return what is not a number, on the CPU."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from jaxllm.config import LoraConfig, ModelConfig
from jaxllm.errors import UserError, note
from jaxllm.model import kernels as choice
from jaxllm.model.kernels import CUDA, REPLACEABLE, choose_kernels, grouped_loop, grouped_triton, self_check
from jaxllm.model.kernels.causal_attention import blocked_attention, cudnn_attention, cudnn_refuses
from jaxllm.model.kernels.interface import ExpertKernels, ExpertRows, Saved
from jaxllm.model.kernels.self_check import Check, check_kernels, small_sizes
from jaxllm.run import self_check as at_start
from jaxllm.run.self_check import failures, kernels_to_avoid
from jaxllm.store.metrics_file import read_metrics

SMALL = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, moe_intermediate_size=48,
    max_position_embeddings=32,
)  # fmt: skip
PADDING = 3


# Kernels that are correct: every row multiplies a copy of its expert's weights


def _products(x, weights):
    return tuple(jnp.einsum("md,mdf->mf", x, weight) for weight in weights)


def _rows(rows: ExpertRows):
    P, E = rows.row_weights.shape[0], rows.group_sizes.shape[0]
    group = jnp.clip(jnp.searchsorted(jnp.cumsum(rows.group_sizes), jnp.arange(P), side="right"), 0, E - 1)
    tokens = jnp.arange(P) if rows.tokens is None else rows.tokens
    own = tuple(jax.lax.dynamic_slice_in_dim(weight, rows.offset, E) for weight in rows.weights)
    return tokens, group, own, (jnp.arange(P) < rows.group_sizes.sum())[:, None]


def _network(x, w, own, group, saved=None):
    gate, up, down = (weight[group] for weight in own)
    g, u = _products(x, (gate, up)) if saved is None else saved
    return jnp.einsum("mf,mfd->md", w * jax.nn.silu(g) * u, down), jnp.concatenate([g, u], axis=1)


def ffn(rows: ExpertRows, saved: Saved | None):
    tokens, group, own, _ = _rows(rows)
    out, products = _network(rows.x[tokens], rows.row_weights, own, group)
    return out, None if saved is None else saved.rows.at[saved.layer].set(products)


def ffn_gradients(rows: ExpertRows, d_out, saved, totals):
    tokens, group, own, in_group = _rows(rows)
    _, back = jax.vjp(lambda *args: _network(*args, group)[0], rows.x[tokens], rows.row_weights, own)
    d_x, d_w, d_own = back(jnp.where(in_group, d_out[tokens], 0))
    leak = 0 * saved.rows[saved.layer].sum()  # as a block that reads beyond its group: NaN spreads, zeros do not
    both = zip(totals, d_own, strict=True)
    return d_x, d_w, tuple(jax.lax.dynamic_update_slice_in_dim(t, d + leak, rows.offset, 0) for t, d in both)


DENSE = ExpertKernels(
    ffn, ffn_gradients, lambda rows: PADDING, lambda weight, dtype: weight.astype(dtype),
    lambda layers, rows, features, dtype: jnp.zeros((layers, rows + PADDING, features), dtype),
    lambda weight: jnp.full_like(weight, jnp.nan),
)  # fmt: skip


def with_routed(**changes: Any) -> dict[str, str]:
    """Why a model whose experts have these kernels is to do without them."""
    kernels = dataclasses.replace(choose_kernels(SMALL, jnp.float32), routed=dataclasses.replace(DENSE, **changes))
    return failures(check_kernels(kernels, SMALL, jnp.float32, ["routed"]))


def test_correct_kernels_pass():
    assert with_routed() == {}


def raises(*_):
    raise NotImplementedError("Triton is not installed\nfor this device")


def scaled_output(rows, saved):
    out, written = ffn(rows, saved)
    return 1.01 * out, written


def scaled_gradient(rows, d_out, saved, totals):
    d_x, d_w, (d_gate, d_up, d_down) = ffn_gradients(rows, d_out, saved, totals)
    return d_x, d_w, (d_gate, d_up, 1.01 * d_down)


def nan_in_padding_that_is_read(rows, saved):
    out, written = ffn(rows, saved)
    return out, written.at[:, -1].set(jnp.nan)


def nan_in_padding_that_is_not_read(rows, saved):
    out, written = ffn(rows, saved)
    return out.at[-PADDING:].set(jnp.nan), written


def empty_group_not_written(rows, d_out, saved, totals):
    d_x, d_w, made = ffn_gradients(rows, d_out, saved, totals)
    return d_x, d_w, tuple(total.at[rows.offset].set(jnp.nan) for total in made)


def last_row_of_a_group_left_out(rows, saved):
    out, written = ffn(rows, saved)
    return out.at[129].set(0), written


def first_layer_s_experts(rows, saved):
    return ffn(rows._replace(offset=jnp.zeros_like(rows.offset)), saved)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ffn": raises}, "it raises NotImplementedError: Triton is not installed"),
        ({"ffn_gradients": raises}, "it raises NotImplementedError: Triton is not installed"),
        ({"ffn": scaled_output}, "its output differs by 1.0e-02 (limit 4e-03)"),
        ({"ffn_gradients": scaled_gradient}, "its gradient of down differs by 1.0e-02"),
        ({"ffn": nan_in_padding_that_is_read}, "its gradient of gate is not finite"),
        ({"ffn_gradients": empty_group_not_written}, "its gradient of gate is not finite"),
        ({"ffn": last_row_of_a_group_left_out}, "its output differs by"),
        ({"ffn": first_layer_s_experts}, "its output differs by"),
    ],
)
def test_a_kernel_that_fails_says_why(changes, said):
    (failure,) = with_routed(**changes).items()
    assert failure[0] == "routed"
    assert said in failure[1]
    assert "\n" not in failure[1]


@pytest.mark.parametrize(
    ("dtype", "rank"), [("float32", 4), *(pytest.param("bfloat16", rank, marks=pytest.mark.slow) for rank in (4, 16))]
)
def test_experts_with_adapters(dtype, rank):
    lora = LoraConfig(rank=rank, targets="experts")
    kernels = choose_kernels(SMALL, dtype, lora=lora)
    checks = check_kernels(kernels, SMALL, jnp.dtype(dtype), ["routed"], lora)
    assert failures(checks) == {}
    assert "gradient of A of gate" in {check.what for check in checks}

    def without_adapters(rows, saved):
        return kernels.routed.ffn(rows._replace(adapters=None), saved)

    wrong = dataclasses.replace(kernels, routed=dataclasses.replace(kernels.routed, ffn=without_adapters))
    failed = failures(check_kernels(wrong, SMALL, jnp.dtype(dtype), ["routed"], lora))
    assert "its output differs by" in failed["routed"]


def test_padding_that_nothing_reads_may_hold_anything():
    assert with_routed(ffn=nan_in_padding_that_is_not_read) == {}


def scaled(x: jax.Array) -> jax.Array:
    return (1.01 * x.astype(jnp.float32)).astype(x.dtype)


@pytest.mark.parametrize(
    ("attention", "said"),
    [
        (blocked_attention, None),
        (lambda *args: scaled(blocked_attention(*args)), "its output differs by 1.0e-02"),
        (lambda *args: blocked_attention(*args).at[:, -1].set(jnp.nan), "its output is not finite"),
        (lambda q, k, v, mask, scale: blocked_attention(q, k, v, mask, 1.05 * scale), "its output differs by"),
        (lambda q, k, v, mask, scale: blocked_attention(q, k, v, None, scale), "its output, documents apart differs"),
        (cudnn_attention, "it raises RuntimeError"),  # there is no GPU
    ],
)
def test_attention(attention, said):
    kernels = dataclasses.replace(choose_kernels(SMALL, jnp.bfloat16), attention=attention)
    failed = failures(check_kernels(kernels, SMALL, jnp.bfloat16, ["attention"]))
    assert failed == {} if said is None else said in failed["attention"]


def test_the_product(monkeypatch):
    linear = self_check.linear
    monkeypatch.setattr(self_check, "linear", lambda x, w: linear(x, w).at[..., 0].add(1))
    failed = failures(check_kernels(choose_kernels(SMALL, jnp.float32), SMALL, jnp.float32, []))
    assert "its output differs by" in failed["product"]


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_the_kernels_of_this_device_pass(dtype):
    checks = check_kernels(choose_kernels(SMALL, jnp.dtype(dtype)), SMALL, jnp.dtype(dtype))
    assert failures(checks) == {}
    assert {check.kernel for check in checks} == {"product", "routed", "attention"}
    assert all(check.error > 0 for check in checks)


@pytest.mark.parametrize(
    ("size", "small"), [(192, 192), (512, 512), (1024, 384), (1536, 384), (1408, 384), (2064, 272)]
)
def test_small_sizes_have_the_tiles_of_the_large_ones(size, small):
    config = dataclasses.replace(SMALL, hidden_size=size, num_attention_heads=1, moe_intermediate_size=size)
    assert small_sizes(config)[:2] == (small, small)
    for most in (grouped_triton.TILE, grouped_triton.SWIGLU_WIDTH, grouped_triton.DEPTH):
        assert grouped_triton._side(small, most) == grouped_triton._side(size, most)


# The choice


@pytest.mark.parametrize("name", REPLACEABLE)
def test_a_kernel_is_replaced_alone(name):
    everything, plain = (choose_kernels(SMALL, jnp.bfloat16, CUDA, without=some) for some in ((), REPLACEABLE))
    without = choose_kernels(SMALL, jnp.bfloat16, CUDA, without=[name])
    for each in REPLACEABLE:
        assert getattr(without, each) == getattr(plain if each == name else everything, each)
        assert getattr(everything, each) != getattr(plain, each)
    assert (plain.routed, plain.shared, plain.attention) == (grouped_loop.KERNELS, None, blocked_attention)


@pytest.mark.parametrize(
    ("heads", "capability", "said"),
    [
        ((64, 64), 8.0, None),
        ((48, 32), 8.9, None),
        ((192, 128), 9.0, None),
        ((256, 256), 9.0, None),
        ((192, 128), 8.9, "up to 128 here, and the model's have 192"),
        ((192, 128), 0.0, "up to 128"),  # compiled for a GPU that is not here
        ((264, 128), 9.0, "up to 256"),
        ((60, 60), 9.0, "multiple of 8"),
        ((64, 128), 9.0, "larger than those of queries"),
    ],
)
def test_cudnn_takes_heads_by_the_condition_of_its_data_sheet(heads, capability, said):
    refused = cudnn_refuses(*heads, capability)
    assert refused is None if said is None else said in refused


# The start of a run


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A CPU that is taken for an NVIDIA GPU: no kernel of one works on it. Returns the checks of one start."""
    monkeypatch.setattr(choice, "compute_capability", lambda: 9.0)
    monkeypatch.setenv("JAXLLM_CACHE_DIR", str(tmp_path / "cache"))
    note.cache_clear()


@pytest.mark.slow
def test_a_run_goes_on_with_plain_kernels(gpu, narrow, tmp_path, capsys):
    options = [*narrow, "--model.moe-intermediate-size", "32", "--steps", "2", "--precision", "bfloat16"]
    losses = {}
    for kernels in ("auto", "plain"):
        folder = tmp_path / kernels
        assert train.main([*options, "--run-dir", str(folder), "--kernels", kernels]) == 0
        said = capsys.readouterr()
        assert "experts: loop over the experts that have tokens; attention: blocks of queries (bfloat16)" in said.out
        replaced = [line for line in said.err.splitlines() if "is replaced by its plain form" in line]
        assert len(replaced) == (3 if kernels == "auto" else 0)
        for name, line in zip(REPLACEABLE, replaced, strict=False):
            assert line.startswith(f"kernel `{name}` is replaced by its plain form: it raises ")
            assert f"JAX {jax.__version__}" in line
        losses[kernels] = [record["loss"] for record in read_metrics(folder) if "loss" in record]
    assert losses["auto"] == losses["plain"]
    assert np.isfinite(losses["auto"]).all()


def check(kernel: str, failure: str | None = None) -> Check:
    return Check(kernel, "output", 1e-3, failure)


def avoided(monkeypatch, *checks: Check) -> tuple[list[str], int]:
    """What is avoided at a start whose self-check has these results, and how often it ran."""
    ran = []
    monkeypatch.setattr(at_start, "check_kernels", lambda *args: ran.append(args) or list(checks))
    return [*kernels_to_avoid(SMALL, jnp.bfloat16)], len(ran)


def test_only_a_self_check_that_passed_is_kept(gpu, monkeypatch, capsys):
    assert avoided(monkeypatch, check("routed"), check("attention", "it raises")) == (["attention"], 1)
    assert avoided(monkeypatch, check("routed"), check("attention")) == ([], 1)
    assert avoided(monkeypatch, check("routed", "it raises")) == ([], 0)
    monkeypatch.setattr(at_start, "versions", lambda: {"driver": "999.1"})
    assert avoided(monkeypatch, check("routed")) == ([], 1)  # another driver
    assert "kernel `attention` is replaced" in capsys.readouterr().err


def test_a_kernel_that_fails_in_another_process_is_avoided(gpu, monkeypatch):
    monkeypatch.setattr(at_start, "all_gather", lambda mine: mine | {"shared": "it raises"})
    assert avoided(monkeypatch, check("routed", "its output differs")) == (["routed", "shared"], 1)


def test_a_wrong_product_ends_the_run(gpu, monkeypatch):
    with pytest.raises(UserError, match=r"the matrix product of this device is wrong: it raises .*--kernels plain"):
        avoided(monkeypatch, check("product", "it raises"))
    assert kernels_to_avoid(SMALL, jnp.bfloat16, "plain") == REPLACEABLE


def test_without_a_gpu_nothing_is_checked(monkeypatch):
    assert avoided(monkeypatch, check("routed", "it raises")) == ([], 0)


def test_a_cache_that_cannot_be_written_is_no_obstacle(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXLLM_CACHE_DIR", str(tmp_path / "file"))
    assert avoided(monkeypatch, check("routed")) == ([], 1)


def test_the_kept_result_says_what_was_checked(gpu, monkeypatch, tmp_path):
    avoided(monkeypatch, check("routed"))
    (file,) = (tmp_path / "cache" / "kernels").iterdir()
    assert json.loads(file.read_text())["checks"][0]["kernel"] == "routed"
