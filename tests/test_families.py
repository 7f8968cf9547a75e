"""The DeepSeek family's files: config.json, names of tensors, FP8, pieces of large models.

Against transformers' own models: parity_tests/test_deepseek.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import train
from convert import fp8
from convert.__main__ import main as convert
from convert.mapping import PARAMS, ROUTING_BIAS, entries
from convert.to_flax import read_folder, read_weights
from convert.to_torch import write_model
from jaxllm import PRESETS, UserError, from_pretrained
from jaxllm.config import ModelConfig, RouterConfig, YarnConfig
from jaxllm.config.families import FAMILIES, check_trainable, family_of, is_interleaved, read_config, write_config
from jaxllm.errors import note
from jaxllm.files import write_json
from jaxllm.model.decoder import abstract_model
from jaxllm.store.checkpoint import Weights, load_weights

V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 60, "hidden_size": 32, "intermediate_size": 40,
    "moe_intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
    "n_shared_experts": 2, "n_routed_experts": 8, "kv_lora_rank": 20, "q_lora_rank": 28, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "qk_nope_head_dim": 10, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3,
    "first_k_dense_replace": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
}  # fmt: skip
CONFIG = read_config(V3)


def numbered_weights(config: ModelConfig) -> Weights:
    """Weights that bfloat16 holds exactly, of which neighbours differ."""
    rng = np.random.default_rng(0)
    trees = abstract_model(config)[1:]
    return Weights(*jax.tree.map(lambda leaf: rng.integers(-64, 64, leaf.shape).astype(np.float32) / 64, trees))


def assert_same_bits(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def folder_of(path: Path, source: dict[str, Any] = V3, dtype: str = "float32") -> Path:
    config = read_config(source)
    write_model(config, numbered_weights(config), path, dtype, source)
    return path


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    with safe_open(folder / "model.safetensors", "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict


def write_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file by hand: the package does not write FP8 from NumPy."""
    names = {"float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0"}
    header, offset = {}, 0
    for name, value in tensors.items():
        place = [offset, offset + value.nbytes]
        header[name] = {"dtype": names[value.dtype.name], "shape": list(value.shape), "data_offsets": place}
        offset += value.nbytes
    encoded = json.dumps(header).encode()
    body = b"".join(np.ascontiguousarray(value).tobytes() for value in tensors.values())
    (folder / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + body)


# names of tensors


@st.composite
def shapes(draw) -> dict[str, Any]:
    """Config.json files that differ in all that decides names and places."""
    family = draw(st.sampled_from(["deepseek_v3", "deepseek_v2"]))
    layers = draw(st.integers(1, 3))
    sizes = st.integers(1, 9)
    return V3 | {
        "model_type": family, "num_hidden_layers": layers, "first_k_dense_replace": draw(st.integers(0, layers)),
        "q_lora_rank": draw(st.none() | sizes), "kv_lora_rank": draw(sizes), "qk_nope_head_dim": draw(sizes),
        "qk_rope_head_dim": 2 * draw(sizes), "v_head_dim": draw(sizes), "num_attention_heads": (heads := draw(sizes)),
        "num_key_value_heads": heads, "hidden_size": draw(sizes), "n_shared_experts": draw(st.integers(1, 3)),
        "attention_bias": draw(st.booleans()), "tie_word_embeddings": draw(st.booleans()),
        "rope_interleave": draw(st.booleans()), "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(shapes())
def test_every_element_goes_to_one_place_and_back(source):
    config = read_config(source)
    _, params, bias = abstract_model(config)
    trees = {PARAMS: params, ROUTING_BIAS: bias}
    offsets = np.cumsum([0] + [leaf.size for leaf in jax.tree.leaves(trees)])
    leaves, tree = jax.tree.flatten(trees)
    numbers = [np.arange(leaf.size).reshape(leaf.shape) + start for leaf, start in zip(leaves, offsets, strict=False)]
    numbered, back = jax.tree.unflatten(tree, numbers), jax.tree.unflatten(tree, [np.zeros_like(n) for n in numbers])
    table = list(entries(config, is_interleaved(source)))
    assert len({entry.torch_name for entry in table}) == len(table)
    seen = []
    for entry in table:
        tensor = entry.to_torch(numbered)
        assert tensor.shape == entry.shape(trees)
        seen.append(tensor.ravel())
        entry.write(back, tensor)
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(offsets[-1]))
    assert_same_bits(back, numbered)


def test_the_places_of_joined_tensors():
    """By hand, one of each kind."""
    weights = numbered_weights(CONFIG)
    trees = {PARAMS: weights.params, ROUTING_BIAS: weights.routing_bias}
    table = {entry.torch_name: entry.to_torch(trees) for entry in entries(CONFIG)}
    layer = jax.tree.map(lambda leaf: leaf[0], weights.params["decoder_layers"])
    attention, n, r, v, R = layer["self_attn"], 10, 8, 12, 20
    joined = table["model.layers.1.self_attn.q_b_proj.weight"]  # head by head n rows, then r in pairs (2i, 2i+1)
    np.testing.assert_array_equal(joined[n + r : n + r + n], attention["q_proj_u"]["weight"][:, n : 2 * n].T)
    np.testing.assert_array_equal(joined[n : n + r][::2], attention["rope_q"]["weight"][:, : r // 2].T)
    np.testing.assert_array_equal(joined[n : n + r][1::2], attention["rope_q"]["weight"][:, r // 2 : r].T)
    latent = table["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"]
    np.testing.assert_array_equal(latent[:R], attention["kv_proj_d"]["weight"].T)
    np.testing.assert_array_equal(latent[R:][::2], attention["rope_k"]["weight"][:, : r // 2].T)
    expanded = table["model.layers.1.self_attn.kv_b_proj.weight"]
    np.testing.assert_array_equal(expanded[n + v :][n:], attention["v_proj_u"]["weight"][:, v:].T)
    down = table["model.layers.1.mlp.shared_experts.down_proj.weight"]
    np.testing.assert_array_equal(down[:, 24:], layer["mlp"]["shared_experts"]["down_proj"]["weight"][1].T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("interleave", [True, False])
def test_in_and_out_again_is_bitwise(tmp_path, dtype, interleave):
    source = V3 | {"rope_interleave": interleave, "torch_dtype": dtype, "auto_map": {"AutoModel": "code.Model"}}
    folder_of(tmp_path / "in", source, dtype)
    for name, values in (("config.json", source), ("generation_config.json", {"eos_token_id": [1, 2], "top_p": 0.6})):
        write_json(tmp_path / "in" / name, values)
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    (tmp_path / "in" / "chat_template.jinja").write_text("{{ messages }}")
    assert convert(["to-flax", str(tmp_path / "in"), str(tmp_path / "run")]) == 0
    assert convert(["to-torch", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "in" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in written
    assert (written["topk_method"], written["scoring_func"]) == ("noaux_tc", "sigmoid")  # vLLM needs both
    assert {key: written[key] for key in source if key != "auto_map"} == {
        k: v for k, v in source.items() if k != "auto_map"
    }
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "in" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        bias = file.get_slice("model.layers.1.mlp.gate.e_score_correction_bias")
        assert bias.get_dtype() == "F32"


def test_the_routing_bias_is_required_and_mtp_is_passed_over(tmp_path, capsys):
    folder = folder_of(tmp_path / "model")
    tensors = tensors_of(folder)
    extra = {
        "model.layers.3.eh_proj.weight": np.ones((2, 2), np.float32),
        "model.layers.3.mlp.experts.0.up_proj.weight": np.ones((2, 2), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    write_tensors(folder, tensors | extra)
    _, weights, _ = read_folder(folder)
    assert_same_bits(weights, numbered_weights(CONFIG))
    assert "left out 2 tensors of layers from 3 on" in capsys.readouterr().err
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    write_tensors(folder, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(UserError, match=f"missing: {name}"):
        read_folder(folder)


def test_a_piece_of_a_large_model(tmp_path):
    folder = folder_of(tmp_path / "model")
    assert convert(["to-flax", str(folder), str(tmp_path / "run"), "--layers", "2"]) == 0
    config, weights = load_weights(tmp_path / "run")
    assert (config.num_hidden_layers, config.dense_layers) == (2, 1)
    whole = numbered_weights(CONFIG)
    first = whole._replace(
        params=whole.params | {"decoder_layers": jax.tree.map(lambda leaf: leaf[:1], whole.params["decoder_layers"])},
        routing_bias=jax.tree.map(lambda leaf: leaf[:1], whole.routing_bias),
    )
    assert_same_bits(tuple(weights), tuple(first))
    assert convert(["to-torch", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert read_folder(tmp_path / "out")[0] == config
    assert convert(["to-flax", str(folder), str(tmp_path / "none"), "--layers", "4"]) == 2


def test_from_pretrained_reads_any_family(tmp_path):
    model = from_pretrained(folder_of(tmp_path / "model", V3 | {"model_type": "kimi_k2"}))
    assert model(jnp.arange(10)[None]).shape == (1, 10, 60)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "deepseek_v3"


# FP8


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 127, 128, 152, 257, 576]), st.sampled_from([1, 33, 128, 131, 300]), st.integers(0, 9))
def test_fp8_blocks_equal_the_rule(rows, columns, seed):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, columns)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.random(fp8.scale_shape((rows, columns)), np.float32)
    row, column = np.indices((rows, columns)) // 128
    expected = values.astype(np.float32) * scales[row, column]
    np.testing.assert_array_equal(fp8.dequantize(values, scales), expected)


def fp8_folder(path: Path, scale_dtype: Any = np.float32) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder whose linears are FP8, and what they are by the rule."""
    source = V3 | {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}
    source |= {"hidden_size": 144, "intermediate_size": 200}
    folder_of(path, {key: value for key, value in source.items() if key != "quantization_config"})
    write_json(path / "config.json", source)
    stored, plain = {}, {}
    for name, value in tensors_of(path).items():
        stored[name] = plain[name] = value
        if ".layers." in name and value.ndim == 2 and "gate.weight" not in name:
            q = value.astype(ml_dtypes.float8_e4m3fn)
            shape = fp8.scale_shape(value.shape)
            scales = (2.0 ** np.arange(-3, np.prod(shape) - 3).reshape(shape)).astype(scale_dtype)
            stored |= {name: q, name + "_scale_inv": scales}
            row, column = np.indices(value.shape) // 128
            plain[name] = q.astype(np.float32) * scales.astype(np.float32)[row, column]
    write_tensors(path, stored)
    return path, plain


@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.float8_e8m0fnu])
def test_an_fp8_folder_is_the_folder_of_its_values(tmp_path, scale_dtype):
    folder, plain = fp8_folder(tmp_path / "fp8", scale_dtype)
    config, weights, source = read_folder(folder)
    write_model(config, weights, tmp_path / "plain", "float32", source)
    found = tensors_of(tmp_path / "plain")
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scales: None, "missing: .*o_proj.weight_scale_inv"),
        (lambda scales: scales[:, :0], r"of another shape: .*o_proj.weight_scale_inv \[2, 0\] instead of \[2, 1\]"),
    ],
)
def test_a_scale_that_is_missing_or_misshaped_is_named(tmp_path, change, message):
    folder, _ = fp8_folder(tmp_path / "fp8")
    name = "model.layers.0.self_attn.o_proj.weight"
    with safe_open(folder / "model.safetensors", "numpy") as file:
        stored = {key: file.get_tensor(key) for key in file.keys() if "scale" in key or "norm" in key}  # noqa: SIM118
    stored = {key: value for key, value in stored.items() if key == name + "_scale_inv"}
    config = read_config(json.loads((folder / "config.json").read_text()))
    weights = numbered_weights(config)
    trees = {PARAMS: weights.params, ROUTING_BIAS: weights.routing_bias}
    tensors = {entry.torch_name: np.ascontiguousarray(entry.to_torch(trees)) for entry in entries(config)}
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    scales = change(stored[name + "_scale_inv"])
    write_tensors(folder, tensors | ({} if scales is None else {name + "_scale_inv": scales}))
    with pytest.raises(UserError, match=message):
        read_weights(folder, config)


# config.json


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama': it must be one of customllm, deepseek_v3"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2: with model_type deepseek_v3 it must be 1"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy': with model_type deepseek_v3 it must be noaux_tc"),
        ({"model_type": "deepseek_v2", "topk_method": "noaux_tc"}, "it must be greedy or group_limited_greedy"),
        ({"model_type": "deepseek_v2", "num_experts_per_tok": None}, "num_experts_per_tok is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear': it must be default or yarn"),
        ({"n_group": 3, "topk_group": 1}, "n_group is 3: it must divide n_routed_experts = 8"),
        ({"n_group": 8, "topk_group": 8}, "n_group is 8: .* at least two"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5: it must be at most 4"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7: it must be even"),
        (
            {
                "model_type": "glm4_moe_lite",
                "n_group": 1,
                "topk_group": 1,
                "mlp_layer_types": ["dense", "sparse", "dense"],
            },
            "no dense layer may come after a sparse one",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq'"),
        ({"kv_lora_rank": "512"}, "kv_lora_rank is '512'"),
        ({"hidden_size": -1}, "hidden_size is -1"),
    ],
)
def test_what_contradicts_the_family_is_refused_in_one_line(tmp_path, change, message):
    write_json(tmp_path / "config.json", V3 | change)
    with pytest.raises(UserError, match=message) as error:
        read_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_a_changed_model_keeps_the_pairs_of_its_file():
    source = V3 | {"rope_interleave": False}
    written = write_config(dataclasses.replace(CONFIG, eos_token_id=5), "float32", source)
    assert (written["rope_interleave"], written["eos_token_id"]) == (False, 5)
    assert read_config(written) == dataclasses.replace(CONFIG, eos_token_id=5)


def test_dropout_of_attention_weights_is_read_and_not_trained(tmp_path):
    folder = folder_of(tmp_path / "model", V3)
    write_json(folder / "config.json", V3 | {"attention_dropout": 0.1})
    assert read_folder(folder)[0] == CONFIG
    with pytest.raises(UserError, match=r"attention_dropout is 0.1: to train, it must be 0"):
        check_trainable(json.loads((folder / "config.json").read_text()))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**12) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "rope_type", "factor", "rope_theta"]), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = (
    *(key for key in V3 if key != "model_type"),
    "rope_parameters", "rope_scaling", "rope_theta", "mlp_layer_types", "quantization_config", "eos_token_id",
    "hidden_act", "moe_layer_freq", "scoring_func", "topk_method", "partial_rotary_factor", "rope_interleave",
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(list(FAMILIES)), st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_any_config_is_read_or_refused_in_one_line(model_type, change):
    message = ""
    try:
        config = read_config(V3 | {"model_type": model_type} | change)
    except UserError as error:
        message = str(error)
    else:
        assert read_config(write_config(config, "float32")).num_hidden_layers == config.num_hidden_layers
    assert "\n" not in message


def test_weights_that_do_not_fit_do_not_cost_the_earlier_run(tmp_path, capsys):
    folder, run = folder_of(tmp_path / "model"), tmp_path / "run"
    assert convert(["to-flax", str(folder), str(run)]) == 0
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    (folder / "model.safetensors").write_bytes(b"nothing")
    options = ["--init", str(folder), "--run-dir", str(run), "--overwrite", "--seq-len", "16", "--batch-size", "1"]
    assert train.main(options) == 2
    assert "is not a complete safetensors file" in capsys.readouterr().err
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_their_config_file(name):
    config = PRESETS[name]
    written = write_config(config, "bfloat16")
    assert dataclasses.replace(read_config(written), dropout=config.dropout).resolved() == config.resolved()
    assert written["model_type"] == family_of(config).model_type


def test_a_shape_that_no_family_has_cannot_be_exported(tmp_path):
    config = dataclasses.replace(PRESETS["tiny"], latent_norm=True)
    with pytest.raises(UserError, match="no PyTorch model has all options"):
        write_model(config, numbered_weights(config), tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [CONFIG, PRESETS["tiny"], PRESETS["deepseek-v2"]])
def test_a_run_s_config_survives_json(config):
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_defaults_are_transformers_s():
    torch_config = pytest.importorskip("transformers").AutoConfig
    for model_type, family in FAMILIES.items():
        if model_type in ("customllm", "kimi_k2"):
            continue
        theirs = torch_config.for_model(model_type, num_experts_per_tok=4).to_dict()
        ours = family.read({"model_type": model_type, "num_experts_per_tok": 4})
        assert ours.vocab_size == theirs["vocab_size"]
        for name in ("hidden_size", "num_hidden_layers", "kv_lora_rank", "max_position_embeddings", "rms_norm_eps"):
            assert getattr(ours, name) == theirs[name], (model_type, name)
        assert ours.q_lora_rank == theirs["q_lora_rank"]
        assert ours.tie_word_embeddings == theirs["tie_word_embeddings"]
        if ours.moe_layers:
            assert ours.router.routed_scaling_factor == theirs["routed_scaling_factor"]
            assert ours.n_routed_experts == theirs["n_routed_experts"]


def test_several_end_tokens_and_yarn_are_read():
    scaling = {"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}
    config = read_config(V3 | {"eos_token_id": [3, 4], "rope_scaling": scaling, "rope_theta": 5e4})
    assert config.eos_token_ids == (3, 4)
    assert config.rope_theta == 5e4
    assert config.rope_scaling == YarnConfig(
        40.0, original_max_position_embeddings=64, mscale=0.707, mscale_all_dim=0.707
    )
    np.testing.assert_allclose(config.softmax_scale * 18**0.5, 1.5896, rtol=1e-4)  # DeepSeek-V2-Lite's
    assert config.router == RouterConfig(n_group=4, topk_group=2, routed_scaling_factor=2.5)


# what real folders are like


@pytest.mark.parametrize(
    ("change", "bos", "eos", "said"),
    [
        ({"bos_token_id": 128_000}, None, 1, "bos_token_id is 128000: left out 128000, as ids are 0 to 59"),
        ({"eos_token_id": 60}, 0, None, "eos_token_id is 60: left out 60"),
        ({"eos_token_id": [3, 128_001, 4]}, 0, (3, 4), r"eos_token_id is \[3, 128001, 4\]: left out 128001,"),
        ({"eos_token_id": [128_001]}, 0, None, "left out 128001"),
        ({"eos_token_id": -1}, 0, None, "eos_token_id is -1: left out -1"),
        ({"bos_token_id": -1}, None, 1, "bos_token_id is -1: left out -1, as ids are 0 to"),
        ({"pad_token_id": -1}, 0, 1, "pad_token_id is -1: left out -1, as ids are 0 to"),
        ({"bos_token_id": 59}, 59, 1, None),
    ],
)
@pytest.mark.parametrize("model_type", ["deepseek_v3", "youtu", "customllm"])
def test_a_special_token_beyond_the_vocabulary_is_left_out_in_a_line(model_type, change, bos, eos, said, capsys):
    note.cache_clear()
    shape = {name: V3[name] for name in ("vocab_size", "num_hidden_layers")}
    customllm = shape | {"hidden_size": 32, "num_attention_heads": 2, "moe_intermediate_size": 24}
    source = (customllm if model_type == "customllm" else V3) | {"bos_token_id": 0, "eos_token_id": 1}
    config = read_config(source | {"model_type": model_type} | change)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (bos, eos, None)
    err = capsys.readouterr().err
    assert re.search(said, err) if said else not err
    with pytest.raises(
        UserError, match="pad_token_id is 60: it must be 0 to vocab_size - 1 = 59"
    ):  # transformers refuses it as well
        read_config(source | {"model_type": model_type, "pad_token_id": 60})


def test_a_file_keeps_the_special_tokens_that_it_is_not_read_with():
    source = V3 | {"bos_token_id": 128_000, "eos_token_id": [1, 128_001]}
    written = write_config(read_config(source), "float32", source)
    assert {key: written[key] for key in source} == source


@pytest.mark.parametrize("name", [name for name, model in PRESETS.items() if family_of(model).names == "deepseek"])
def test_what_servers_read_without_a_default_is_written(name):
    written = write_config(PRESETS[name], "bfloat16")
    bare = {"moe_layer_freq": 1, "seq_aux": True, "aux_loss_alpha": 0.0, "ep_size": 1}
    assert {key: written[key] for key in bare} == bare
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"


def test_only_what_changed_is_written_anew():
    source = V3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "ep_size": 1, "custom": {"a": None}}
    config = read_config(source)
    named = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "architectures": ["DeepseekV3ForCausalLM"]}
    assert write_config(config, "float16", source) == source | named
    changed = write_config(dataclasses.replace(config, eos_token_id=(4, 5)), "float16", source)
    assert changed == source | named | {"eos_token_id": [4, 5]}
    other = write_config(dataclasses.replace(config, rope_theta=1e4), "float16", source)
    assert other["rope_theta"] == 1e4
    assert "rope_parameters" not in other
    assert read_config(other).rope_theta == 1e4


def sharded(folder: Path, keep: tuple[int, ...] = (0, 1, 2)) -> None:
    """A folder's weights as one shard for each layer, and one for the rest; of the layers only those in `keep`."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for name in tensors:
        layer = name.split(".")[2] if ".layers." in name else "rest"
        weight_map[name] = f"model-{layer}.safetensors"
    for file in {*weight_map.values()}:
        if file == "model-rest.safetensors" or int(file[6]) in keep:
            write_tensors(folder, {name: values for name, values in tensors.items() if weight_map[name] == file})
            (folder / "model.safetensors").rename(folder / file)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def test_a_piece_needs_only_its_shards(tmp_path, capsys):
    folder = folder_of(tmp_path / "model")
    whole = read_folder(folder, layers=2)
    sharded(folder, keep=(0, 1))
    found = read_folder(folder, layers=2)
    assert found[0] == whole[0]
    assert_same_bits(tuple(found[1]), tuple(whole[1]))
    assert "left out 38 tensors of layers from 2 on" in capsys.readouterr().err
    assert convert(["to-flax", str(folder), str(tmp_path / "run"), "--layers", "2"]) == 0
    assert convert(["to-torch", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    for layers in (None, 3):
        with pytest.raises(UserError, match=r"names the file 'model-2\.safetensors', which the folder does not hold"):
            read_folder(folder, layers)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_tied_head_in_the_file_must_be_the_table(form, tmp_path, capsys):
    note.cache_clear()
    folder = folder_of(tmp_path / "model", V3 | {"tie_word_embeddings": True})
    write_json(folder / "config.json", V3 | {"tie_word_embeddings": True})
    tensors = tensors_of(folder)
    table = tensors["model.embed_tokens.weight"]

    def save(head: np.ndarray) -> None:
        if form == "safetensors":
            write_tensors(folder, tensors | {"lm_head.weight": head})
            return
        torch = pytest.importorskip("torch")
        (folder / "model.safetensors").unlink(missing_ok=True)
        state = {name: torch.from_numpy(values) for name, values in (tensors | {"lm_head.weight": head}).items()}
        torch.save(state, folder / "pytorch_model.bin")

    save(table)
    _, weights, _ = read_folder(folder)
    assert_same_bits(tuple(weights), tuple(numbered_weights(read_config(V3 | {"tie_word_embeddings": True}))))
    assert "lm_head.weight is left out: it equals model.embed_tokens.weight" in capsys.readouterr().err
    save(table + np.float32(1))
    with pytest.raises(UserError, match=r"tie_word_embeddings is true, and lm_head\.weight differs from"):
        read_folder(folder)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2"])
def test_a_state_dict_of_transformers_5_is_read(name, tmp_path):
    """Saved as it is in memory, with joined experts: the same model as the folder that `save_pretrained` writes."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    source = V3 | {"model_type": name} | ({"topk_method": "greedy"} if name == "deepseek_v2" else {})
    folder = folder_of(tmp_path / "model", source)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (tmp_path / "saved").mkdir()
    torch.save(model.state_dict(), tmp_path / "saved" / "pytorch_model.bin")
    assert any(key.endswith("experts.gate_up_proj") for key in model.state_dict())
    (tmp_path / "saved" / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert_same_bits(tuple(read_folder(tmp_path / "saved")[1]), tuple(read_folder(folder)[1]))


CODE = """
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from .helper import WIDTH


class OwnModel(DeepseekV3ForCausalLM):
    width = WIDTH
"""


def test_code_that_auto_map_names_travels_and_is_not_run(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    named = {"AutoModelForCausalLM": "modeling_own.OwnModel", "AutoTokenizer": ["helper.Slow", None]}
    source = V3 | {"auto_map": named, "torch_dtype": "float32"}
    folder = folder_of(tmp_path / "in", source)
    write_json(folder / "config.json", source)
    files = {"modeling_own.py": CODE, "helper.py": "WIDTH = 7\n", "broken.py": "raise SystemExit('it was run')\n"}
    for name, content in files.items():
        (folder / name).write_text(content)
    assert convert(["to-flax", str(folder), str(tmp_path / "run")]) == 0
    assert convert(["to-torch", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    for name, content in files.items():
        assert (tmp_path / "out" / name).read_text() == content
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (type(loaded).__name__, loaded.width) == ("OwnModel", 7)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert type(stock).__name__ == "DeepseekV3ForCausalLM"
    (tmp_path / "run" / "source" / "modeling_own.py").unlink()
    assert convert(["to-torch", str(tmp_path / "run"), str(tmp_path / "without")]) == 0
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())
