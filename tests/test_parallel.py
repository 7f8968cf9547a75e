"""One step, four ways to run it: every layout computes what one device computes, and reads every other's checkpoints.

On simulated devices (`conftest.py`): eight CPU devices, whose collectives are real.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm.model.layout
import train
from jaxllm.config import PRESETS, TrainConfig
from jaxllm.data.stream import Position
from jaxllm.errors import UserError
from jaxllm.files import write_json
from jaxllm.model.batch import TokenBatch
from jaxllm.model.decoder import abstract_model, model_facts
from jaxllm.model.layout import MESH_AXIS, Layout
from jaxllm.store.checkpoint import newest_checkpoint
from jaxllm.store.checkpoint_writer import CheckpointWriter
from jaxllm.store.history import History
from jaxllm.train.computation import Computation
from jaxllm.train.loss import IGNORED
from jaxllm.train.optim import StepNumbers
from jaxllm.train.placement import OneDevice, Placement, choose_placement, compile_programs, lower_step
from jaxllm.train.sharding import choose_mesh
from jaxllm.train.state import TrainState
from tests.configs import small

STEPS, ROWS = 3, 32
CONFIG = TrainConfig.from_options(
    model=small(vocab_size=61, num_hidden_layers=2, n_routed_experts=8, max_position_embeddings=32, dropout=0.1),
    seq_len=4,
    batch_size=ROWS,
    steps=50,
    warmup_steps=2,
    bias_update_rate=1e-2,
    balance_loss=1e-2,
    router_z_loss=1e-3,
)

ACCUMULATED = {"batch_size": ROWS // 4, "grad_accum": 4}
LAYOUTS = {
    "pmap": {"parallel": "pmap"},
    "pmap, accumulated, remat": {"parallel": "pmap", "remat": True, **ACCUMULATED},
    "all axes": {"mesh": "data=2,fsdp=2,expert=2"},
    "all axes, accumulated, remat": {"mesh": "data=2,fsdp=2,expert=2", "remat": True, **ACCUMULATED},
    "fsdp": {"mesh": "fsdp=8", "remat": True},
    "experts": {"mesh": "expert=8"},
}


def batch(seed: int) -> np.ndarray:
    """Rows with different numbers of targets; one has none."""
    labels = np.random.default_rng(seed).integers(
        0, CONFIG.model.vocab_size, (ROWS, CONFIG.data.seq_len), dtype=np.int32
    )
    labels[0, 3:], labels[1] = IGNORED, IGNORED
    return labels


def placement_of(config: TrainConfig) -> Placement:
    return choose_placement(config.mesh, config.data.batch_size)


def run(**changes) -> tuple[TrainState, list[list[float]], list[float]]:
    """Steps on one global batch after another: the state in the form of one device, the metrics, an evaluation."""
    config = CONFIG.with_options(**changes)
    placement, computation = placement_of(config), Computation.of(config)
    programs = compile_programs(placement, computation)
    state, metrics = train_steps(config, programs.step, placement.init(computation))
    labels = batch(STEPS)[: config.data.batch_size]
    labels[ROWS // 4 :] = IGNORED  # so that micro-batches of any size have the same targets
    evaluation = [float(value) for value in programs.evaluate(state, TokenBatch(labels))]
    return placement.unshard(state), metrics, evaluation


def run_steps(**changes) -> tuple[TrainState, list[list[float]]]:
    """`run` on one device or on a mesh, without the programs of the first state and of evaluation."""
    config = CONFIG.with_options(**changes)
    placement, computation = placement_of(config), Computation.of(config)
    state = OneDevice().init(Computation.of(config.with_options(remat=False)))
    state = jax.device_put(state, placement.state_shardings(computation))
    step = lower_step(computation, placement.layout).compile()
    return train_steps(config, step, state)


def train_steps(config: TrainConfig, step: Callable, state: TrainState) -> tuple[TrainState, list[list[float]]]:
    metrics, numbers = [], StepNumbers.of(config.optim, config.schedule)
    for seed in range(STEPS):
        labels = batch(seed).reshape(config.data.grad_accum, config.data.batch_size, config.data.seq_len)
        before, (state, measured) = state, step(state, TokenBatch(labels), numbers)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))  # updated in place
        metrics.append([float(value) for value in measured])
    return state, metrics


@pytest.fixture(scope="module")
def one_device():
    return run()


def differences(state: TrainState, other: TrainState) -> dict[str, float]:
    """Relative distance of each array: of weights, moments and all."""

    def distance(a, b) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12))

    found = jax.tree.map(distance, state, other)
    return {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(found)}


TOLERANCE = 2e-5
"""Sums in another order, in float32; three steps of AdamW, whose first are as large for a tiny gradient as for any."""


SLOW = {"pmap", "all axes", "fsdp", "experts"}  # the others show them too


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS]
)
def test_every_layout_computes_what_one_device_computes(one_device, name):
    wanted, wanted_metrics, wanted_evaluation = one_device
    state, metrics, evaluation = run(**LAYOUTS[name])
    np.testing.assert_allclose(metrics, wanted_metrics, rtol=2e-6)
    np.testing.assert_allclose(evaluation, wanted_evaluation, rtol=2e-6)
    worst = max(differences(state, wanted).items(), key=lambda item: item[1])
    assert worst[1] < TOLERANCE, worst
    jax.tree.map(np.testing.assert_array_equal, state.routing_bias, wanted.routing_bias)
    assert np.abs(jax.tree.leaves(state.routing_bias)[0]).max() > 5e-3


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "optimizer"), [(True, "adamw"), (False, "adamw"), (False, "muon")])
def test_a_layout_computes_the_deepseek_family_too(tied, optimizer):
    """Two stacks of layers, groups, joined heads; and a tied head on queries that are not compressed."""
    model = dataclasses.replace(
        PRESETS["tiny-deepseek"], vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        q_lora_rank=0 if tied else 12, kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
        intermediate_size=40, moe_intermediate_size=24, n_routed_experts=8, max_position_embeddings=32,
        attention_bias=tied, tie_word_embeddings=tied,
    )  # fmt: skip
    wanted, wanted_metrics = run_steps(model=model, optimizer=optimizer)
    state, metrics = run_steps(model=model, optimizer=optimizer, mesh="data=2,fsdp=2,expert=2", remat=True)
    np.testing.assert_allclose(metrics, wanted_metrics, rtol=2e-6)
    worst = max(differences(state, wanted).items(), key=lambda item: item[1])
    assert worst[1] < TOLERANCE, worst


@pytest.mark.parametrize(
    "fault", ["gradients not summed", pytest.param("dropout by the row on the device", marks=pytest.mark.slow)]
)
def test_a_fault_would_be_seen(one_device, fault, monkeypatch):
    if fault == "gradients not summed":
        monkeypatch.setattr(Layout, "sum_gradients", lambda self, gradients, facts: gradients)
    else:
        monkeypatch.setattr(Layout, "device_index", lambda self: 0)
    state, _ = run_steps(mesh="data=2")
    assert max(differences(state, one_device[0]).values()) > 100 * TOLERANCE


def test_each_device_holds_its_part():
    config = CONFIG.with_options(mesh="data=2,fsdp=2,expert=2")
    state = placement_of(config).init(Computation.of(config))
    D, F = config.model.hidden_size, config.model.moe_intermediate_size

    def parts(weight: jax.Array) -> Counter:
        return Counter(shard.data.shape for shard in weight.addressable_shards)

    for tree in (state.params, state.opt_state.mu, state.opt_state.nu):
        layers = tree["decoder_layers"]
        assert parts(layers["mlp"]["routed_experts"]["down_proj"]["weight"]) == {(2, 4, F, D // 2): 8}
        assert parts(layers["self_attn"]["rope_k"]["weight"]) == {(2, D // 2, D // 2): 8}
        assert parts(tree["lm_head"]["weight"]) == {(D // 2, 61): 8}


@pytest.mark.slow
def test_the_backward_pass_gathers_again_and_keeps_no_gathered_weight(monkeypatch):
    """Kept, layer for layer, they would be the whole model on every device. Without recomputation of the rest."""
    config = CONFIG.with_options(mesh="fsdp=2")
    layout = choose_mesh(config.mesh)

    def stacks_of_gathered_experts() -> int:
        lowered = lower_step(Computation.of(config), layout)
        return len(re.findall(r"[^(]f32\[2,8,(?:32,24|24,32)\]", lowered.compile().as_text()))

    assert stacks_of_gathered_experts() == 0
    monkeypatch.setattr(jaxllm.model.layout, "_is_saved", jax.checkpoint_policies.everything_saveable)
    assert stacks_of_gathered_experts() > 0


def test_every_parameter_names_its_axes_and_is_cut_along_an_axis_once():
    config = dataclasses.replace(CONFIG.model, final_norm=True)
    _, params, bias = abstract_model(config)
    leaves = jax.tree_util.tree_leaves_with_path((params, bias))
    facts = jax.tree.leaves(model_facts(config))
    assert len(leaves) == len(facts)
    for (path, leaf), known in zip(leaves, facts, strict=True):
        assert len(known.axes) == leaf.ndim, path
        cut = [MESH_AXIS[axis] for axis in known.axes if axis in MESH_AXIS]
        assert len(cut) == len(set(cut)), f"two axes of {path} are cut along the same axis of the mesh"


def with_noise(state: TrainState) -> TrainState:
    """Moments and bias that are not zero."""

    rng = np.random.default_rng(0)

    def noisy(leaf: jax.Array) -> jax.Array:
        if leaf.dtype != jnp.float32:
            return leaf
        return jax.device_put(np.asarray(leaf) + rng.standard_normal(leaf.shape, np.float32), leaf.sharding)

    return jax.tree.map(noisy, state)


WAYS = ({"mesh": "data=2,fsdp=2,expert=2"}, {}, {"mesh": "fsdp=4"}, {"mesh": "expert=8"}, {"parallel": "pmap"}, {})


@pytest.mark.slow
def test_a_checkpoint_moves_from_layout_to_layout_bit_for_bit(tmp_path):
    """8 devices -> 1 -> 4 -> 8 -> pmap -> 1."""
    positions = [Position({"file": 3}, 7, np.arange(5, dtype=np.int32), np.ones((2, 4), np.int32))]
    write_json(tmp_path / "config.json", CONFIG.model.to_dict())
    wanted = None
    for step, changes in enumerate(WAYS):
        config = CONFIG.with_options(**changes)
        placement, computation = placement_of(config), Computation.of(config)
        if wanted is None:
            state = with_noise(placement.unshard(placement.init(computation)))
            wanted = jax.tree.map(np.asarray, state)
        else:
            state, restored = newest_checkpoint(tmp_path).state(computation, placement.state_shardings(computation))
            jax.tree.map(np.testing.assert_array_equal, restored.positions, positions)
            state = placement.unshard(placement.shard(state))
            jax.tree.map(np.testing.assert_array_equal, state, wanted)
        checkpoints = CheckpointWriter(tmp_path)
        checkpoints.save(step, state, [position.to_bytes() for position in positions], History())
        checkpoints.close()


@pytest.mark.slow
def test_a_run_changes_its_layout_from_start_to_start(narrow, tmp_path, capsys):
    """Trained on a mesh, on one device, under pmap: the same run as on one device throughout."""
    options = [*narrow, "--save-every", "2", "--keep-checkpoints", "3", "--model.n-routed-experts", "4"]
    options += ["--seq-len", "8", "--batch-size", "8", "--steps", "6", "--sample-tokens", "0"]
    plain, moved = tmp_path / "plain", tmp_path / "moved"
    assert train.main([*options, "--run-dir", str(plain)]) == 0
    said = []
    for steps, way in ((2, ["--mesh", "data=2,expert=2"]), (4, []), (6, ["--parallel", "pmap"])):
        capsys.readouterr()
        assert train.main([*options, "--run-dir", str(moved), *way]) == 0
        said.append(capsys.readouterr().out)
        for folder in (moved / "checkpoints").iterdir():  # as if it had been killed after that step
            if int(folder.name) > steps:
                shutil.rmtree(folder)
    assert "mesh data=2 x fsdp=1 x expert=2" in said[0]
    assert "Resuming from step 2" in said[1]
    assert "pmap over 8 devices" in said[2]

    def losses(folder) -> list[float]:
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [record for record in records if "step" in record and "train_loss" not in record]
        return [record.get("loss", record.get("eval_loss")) for record in steps]

    np.testing.assert_allclose(losses(moved), losses(plain), atol=2e-4)  # as they are printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": "data=2;fsdp=2"}, "mesh is 'data=2;fsdp=2': it must be AXIS=DEVICES"),
        ({"mesh": "model=2"}, "each axis of data, fsdp, expert at most once"),
        ({"mesh": "data=2,data=2"}, "at most once"),
        ({"mesh": "data=0"}, "it must be AXIS=DEVICES"),
        ({"mesh": "data=3"}, "its 3 devices must divide batch_size = 32"),
        ({"mesh": "fsdp=32"}, r"fsdp must divide hidden_size = 32 and the sizes of all heads.*1, 2, 4, 8, 16\)"),
        (
            {"mesh": "expert=3", "batch_size": 6},
            r"expert must divide n_routed_experts = 8 \(sizes that do: 1, 2, 4, 8\)",
        ),
        ({"mesh": "data=2", "parallel": "pmap"}, "--parallel pmap has no mesh"),
        ({"mesh": "data=16"}, "it needs 16 devices, and 8 are available"),
        ({"parallel": "pmap", "batch_size": 12}, "must be a multiple of the 8 available devices"),
        ({"parallel": "threads"}, "parallel is 'threads'"),
    ],
)
def test_a_layout_that_cannot_work_is_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        placement_of(CONFIG.with_options(**changes))
