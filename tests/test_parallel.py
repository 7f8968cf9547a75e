"""One step, four ways to run it: every layout computes what one device computes, and reads every other's checkpoints.

On simulated devices (`conftest.py`): eight CPU devices, whose collectives are real.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm.sharding
import train
from jaxllm.checkpoint import Checkpoints, newest_checkpoint
from jaxllm.config import ModelConfig, TrainConfig, write_json
from jaxllm.data.stream import Position
from jaxllm.errors import UserError
from jaxllm.journal import Journal
from jaxllm.loss import IGNORED
from jaxllm.parallel import (
    choose_layout,
    compile_programs,
    lower_step,
    new_state,
    padded_shapes,
    place,
    state_shardings,
    unplaced,
)
from jaxllm.sharding import MESH_AXIS, Layout, parameter_axes
from jaxllm.step import TrainState, abstract_model, model_graph

STEPS, ROWS = 3, 32
CONFIG = TrainConfig(
    model=ModelConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        moe_intermediate_size=24,
        max_position_embeddings=32,
        dropout=0.1,
    ),
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
    "7 experts on 8 devices": {"mesh": "expert=8"},
}


def batch(seed: int) -> np.ndarray:
    """Rows with different numbers of targets; one has none."""
    labels = np.random.default_rng(seed).integers(0, CONFIG.model.vocab_size, (ROWS, CONFIG.seq_len), dtype=np.int32)
    labels[0, 3:], labels[1] = IGNORED, IGNORED
    return labels


def run(**changes) -> tuple[TrainState, list[list[float]], list[float]]:
    """Steps on one global batch after another: the state in the form of one device, the metrics, an evaluation."""
    config = dataclasses.replace(CONFIG, **changes)
    layout = choose_layout(config)
    state = new_state(config, layout)
    programs = compile_programs(config, model_graph(config), state, layout)
    metrics = []
    for seed in range(STEPS):
        labels = batch(seed).reshape(config.grad_accum, config.batch_size, config.seq_len)
        before, (state, measured) = state, programs.step(state, labels)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))  # updated in place
        metrics.append([float(value) for value in measured])
    evaluation = [float(value) for value in programs.evaluate(state, batch(STEPS)[: config.batch_size])]
    return unplaced(config, layout, state), metrics, evaluation


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


SLOW = {"pmap", "fsdp"}  # the others show them too


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS]
)
def test_every_layout_computes_what_one_device_computes(one_device, name):
    wanted, wanted_metrics, wanted_evaluation = one_device
    state, metrics, evaluation = run(**LAYOUTS[name])
    np.testing.assert_allclose(metrics, wanted_metrics, rtol=2e-6)
    if "accumulated" not in name:
        np.testing.assert_allclose(evaluation, wanted_evaluation, rtol=2e-6)
    worst = max(differences(state, wanted).items(), key=lambda item: item[1])
    assert worst[1] < TOLERANCE, worst
    jax.tree.map(np.testing.assert_array_equal, state.routing_bias, wanted.routing_bias)
    assert np.abs(jax.tree.leaves(state.routing_bias)[0]).max() > 5e-3


@pytest.mark.parametrize("fault", ["gradients not summed", "dropout by the row on the device"])
def test_a_fault_would_be_seen(one_device, fault, monkeypatch):
    if fault == "gradients not summed":
        monkeypatch.setattr(Layout, "sum_gradients", lambda self, gradients: gradients)
    else:
        monkeypatch.setattr(Layout, "number", lambda self: 0)
    state, *_ = run(mesh="data=2")
    assert max(differences(state, one_device[0]).values()) > 100 * TOLERANCE


def test_each_device_holds_its_part():
    config = dataclasses.replace(CONFIG, mesh="data=2,fsdp=2,expert=2")
    state = new_state(config, choose_layout(config))
    D, F = config.model.hidden_size, config.model.moe_intermediate_size

    def parts(weight: jax.Array) -> Counter:
        return Counter(shard.data.shape for shard in weight.addressable_shards)

    for tree in (state.params, state.opt_state[1].mu, state.opt_state[1].nu):
        layers = tree["decoder_layers"]
        assert parts(layers["mlp"]["routed_experts"]["down_proj"]["weight"]) == {(2, 4, F, D // 2): 8}
        assert parts(layers["self_attn"]["rope_k"]["weight"]) == {(2, D // 2, D // 2): 8}
        assert parts(tree["lm_head"]["weight"]) == {(D // 2, 61): 8}
    padding = state.params["decoder_layers"]["mlp"]["routed_experts"]["gate_proj"]["weight"][:, 7]
    assert not np.asarray(padding).any()


def test_what_is_saved_is_cut_too_where_the_experts_do_not_divide():
    """Seven experts on eight devices: in the form of one device they are cut along another axis, not copied."""
    config = dataclasses.replace(CONFIG, mesh="expert=8")
    layout = choose_layout(config)
    state = unplaced(config, layout, new_state(config, layout))
    wanted = state_shardings(config, layout)
    for tree, shardings in ((state.params, wanted.params), (state.opt_state[1].nu, wanted.opt_state[1].nu)):
        experts = tree["decoder_layers"]["mlp"]["routed_experts"]["gate_proj"]["weight"]
        assert experts.shape == (2, 7, 32, 24)
        assert max(shard.data.size for shard in experts.addressable_shards) == experts.size // 8
        assert experts.sharding == shardings["decoder_layers"]["mlp"]["routed_experts"]["gate_proj"]["weight"]


def test_the_backward_pass_gathers_again_and_keeps_no_gathered_weight(monkeypatch):
    """Kept, layer for layer, they would be the whole model on every device. Without recomputation of the rest."""
    config = dataclasses.replace(CONFIG, mesh="fsdp=2")
    layout = choose_layout(config)

    def stacks_of_gathered_experts() -> int:
        lowered = lower_step(config, model_graph(config), layout, padded_shapes(config, layout))
        return len(re.findall(r"[^(]f32\[2,7,(?:32,24|24,32)\]", lowered.compile().as_text()))

    assert stacks_of_gathered_experts() == 0
    monkeypatch.setattr(jaxllm.sharding, "_regather", jax.checkpoint_policies.everything_saveable)
    assert stacks_of_gathered_experts() > 0


def test_every_parameter_stands_in_the_table_once_and_is_cut_along_an_axis_once():
    _, params, bias = abstract_model(dataclasses.replace(CONFIG.model, final_norm=True))
    for tree in (params, bias):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            axes = parameter_axes(path)
            assert len(axes) == leaf.ndim, path
            cut = [MESH_AXIS[axis] for axis in axes if axis in MESH_AXIS]
            assert len(cut) == len(set(cut)), f"two axes of {path} are cut along the same axis of the mesh"
    with pytest.raises(KeyError, match="lora_a"):
        parameter_axes((jax.tree_util.DictKey("lora_a"), jax.tree_util.DictKey("weight")))


def with_noise(state: TrainState) -> TrainState:
    """Moments and bias that are no zeros."""

    def noisy(path, leaf: jax.Array) -> jax.Array:
        key = jax.random.key(len(jax.tree_util.keystr(path)))
        return leaf + jax.random.normal(key, leaf.shape) if leaf.dtype == jnp.float32 else leaf

    return jax.tree_util.tree_map_with_path(noisy, state)


WAYS = ({"mesh": "data=2,fsdp=2,expert=2"}, {}, {"mesh": "fsdp=4"}, {"mesh": "expert=8"}, {"parallel": "pmap"}, {})


def test_a_checkpoint_moves_from_layout_to_layout_bit_for_bit(tmp_path):
    """8 devices -> 1 -> 4 -> 8 -> pmap -> 1."""
    positions = [Position({"file": 3}, 7, np.arange(5, dtype=np.int32), np.ones((2, 4), np.int32))]
    write_json(tmp_path / "config.json", CONFIG.model.to_dict())
    wanted = None
    for step, changes in enumerate(WAYS):
        config = dataclasses.replace(CONFIG, **changes)
        layout = choose_layout(config)
        if wanted is None:
            state = with_noise(unplaced(config, layout, new_state(config, layout)))
            wanted = jax.tree.map(np.asarray, state)
        else:
            state, restored = newest_checkpoint(tmp_path).state(config, state_shardings(config, layout))
            jax.tree.map(np.testing.assert_array_equal, restored.positions, positions)
            state = unplaced(config, layout, place(config, layout, state))
            jax.tree.map(np.testing.assert_array_equal, state, wanted)
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(step, state, positions, Journal())
        checkpoints.close()


@pytest.mark.slow
def test_a_run_changes_its_layout_from_start_to_start(narrow, tmp_path, capsys):
    """Trained on a mesh, on one device, under pmap: the same run as on one device throughout."""
    options = [*narrow, "--save-every", "2", "--keep-checkpoints", "3", "--model.n-routed-experts", "3"]
    options += ["--seq-len", "8", "--batch-size", "8", "--steps", "6", "--sample-tokens", "0"]
    plain, moved = tmp_path / "plain", tmp_path / "moved"
    assert train.main([*options, "--run-dir", str(plain)]) == 0
    said = []
    for steps, way in ((2, ["--mesh", "data=2,expert=2"]), (4, []), (6, ["--parallel", "pmap"])):
        capsys.readouterr()
        assert train.main([*options, "--run-dir", str(moved), *way]) == 0
        said.append(capsys.readouterr().out)
        for folder in (moved / "checkpoints").iterdir():  # as if it had been killed behind that step
            if int(folder.name) > steps:
                shutil.rmtree(folder)
    assert "mesh data=2 x fsdp=1 x expert=2; 2 routed experts a device (1 of 4 are padding)" in said[0]
    assert "Resuming from step 2" in said[1]
    assert "pmap over 8 devices" in said[2]

    def losses(folder) -> list[float]:
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [record.get("loss", record.get("eval_loss")) for record in records if "train_loss" not in record]

    np.testing.assert_allclose(losses(moved), losses(plain), atol=2e-4)  # as they are printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": "data=2;fsdp=2"}, "mesh is 'data=2;fsdp=2': it must be AXIS=DEVICES"),
        ({"mesh": "model=2"}, "each axis of data, fsdp, expert at most once"),
        ({"mesh": "data=2,data=2"}, "at most once"),
        ({"mesh": "data=0"}, "it must be AXIS=DEVICES"),
        ({"mesh": "data=3"}, "its 3 devices must divide batch_size = 32"),
        ({"mesh": "fsdp=32"}, r"fsdp must divide hidden_size = 32 and half of it.*1, 2, 4, 8, 16\)"),
        ({"mesh": "data=2", "parallel": "pmap"}, "--parallel pmap has no mesh"),
        ({"mesh": "data=16"}, "it needs 16 devices, and 8 are here"),
        ({"parallel": "pmap", "batch_size": 12}, "must be a multiple of the 8 devices here"),
        ({"parallel": "threads"}, "parallel is 'threads'"),
    ],
)
def test_a_layout_that_cannot_work_is_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        choose_layout(dataclasses.replace(CONFIG, **changes))
