"""Weights to PyTorch's files and back: bit for bit, every key used once, nothing unpickled, nothing overwritten."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import train
from convert import tensor_files
from convert.__main__ import main
from convert.to_flax import read_weights
from jaxllm import UserError, from_pretrained, save_pretrained
from jaxllm import generate as generation
from jaxllm.model.decoder import split_model
from jaxllm.run.checkpoint import load_weights
from jaxllm.run.metrics import read_metrics


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    assert main(["to-torch", str(run), str(out)]) == 0
    return out


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    """An exported folder to damage."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def assert_same_weights(one, other) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_the_exported_folder_is_what_pytorch_people_know(exported, run):
    names = {path.name for path in exported.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_customllm.py",
        "tokenizer.json",
    } <= names
    card, last = (exported / "README.md").read_text(), [r for r in read_metrics(run) if "eval_loss" in r][-1]
    for part in (
        "library_name: transformers",
        f"{last['eval_loss']:.4f} nats per token",
        "20 steps, 1,280 tokens, adamw",
    ):
        assert part in card, card
    assert card.count('from_pretrained("FOLDER", trust_remote_code=True)') == 2  # else the tokenizer asks for consent
    assert "| data | corpus |" in card  # not where it lies
    tensors = load_file(exported / "model.safetensors")  # the official reader takes the file that we stream
    _, weights = load_weights(run)
    gate = weights.params["decoder_layers"]["mlp"]["routed_experts"]["gate_proj"]["weight"]
    np.testing.assert_array_equal(
        tensors["decoder_layers.1.mlp.routed_experts.2.gate_proj.weight"], np.asarray(gate)[1, 2].T
    )


def test_exporting_needs_no_pytorch(run, tmp_path):
    script = (
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "found = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *rest: None if name == 'torch' else found(name, *rest)\n"
        "from convert.__main__ import main\n"
        f"sys.exit(main(['to-torch', {str(run)!r}, {str(tmp_path / 'out')!r}]))\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_float32_round_trip_is_bit_exact(run, exported, tmp_path):
    assert main(["to-flax", str(exported), str(tmp_path / "back")]) == 0
    assert_same_weights(load_weights(run)[1], load_weights(tmp_path / "back")[1])
    assert load_weights(run)[0] == load_weights(tmp_path / "back")[0]


def test_bfloat16_round_trip_is_bit_exact(run, tmp_path):
    assert main(["to-torch", str(run), str(tmp_path / "one"), "--dtype", "bfloat16"]) == 0
    assert main(["to-flax", str(tmp_path / "one"), str(tmp_path / "back")]) == 0
    assert main(["to-torch", str(tmp_path / "back"), str(tmp_path / "two"), "--dtype", "bfloat16"]) == 0
    first, second = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    assert {str(tensor.dtype) for tensor in load_file(first).values()} == {"bfloat16"}


def test_large_models_are_sharded_with_an_index(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "MAX_SHARD_BYTES", 50_000)
    assert main(["to-torch", str(run), str(tmp_path / "out")]) == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert {path.name for path in shards} == set(index["weight_map"].values())
    assert_same_weights(load_weights(run)[1], read_weights(tmp_path / "out", load_weights(run)[0]))


def test_every_wrong_key_is_named_in_one_error(copy, capsys, tmp_path):
    file = copy / "model.safetensors"
    tensors = load_file(file)
    tensors["surprise.weight"] = tensors.pop("lm_head.bias")
    tensors["token_embeddings.weight"] = tensors["token_embeddings.weight"][1:]
    save_file(tensors, file)
    twice = {"position_embeddings.weight": tensors["position_embeddings.weight"]}
    save_file(twice, copy / "other.safetensors")
    names = dict.fromkeys(tensors, "model.safetensors") | {"x": "other.safetensors"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert main(["to-flax", str(copy), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in (
        "unknown: surprise.weight", "missing: lm_head.bias", "duplicate: position_embeddings.weight",
        "misshaped: token_embeddings.weight [299, 32] instead of [300, 32]",
    ):  # fmt: skip
        assert part in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ending", ["safetensors", "pt", "bin"])
def test_a_raw_state_dict_of_the_source_loads(run, exported, tmp_path, ending):
    tensors = load_file(exported / "model.safetensors")
    raw = {name: values for name, values in tensors.items() if not name.endswith("routing_bias")}
    file = tmp_path / f"state_dict.{ending}"
    if ending == "safetensors":
        save_file(raw, file)
    else:
        torch = pytest.importorskip("torch")
        torch.save({name: torch.from_numpy(values) for name, values in raw.items()}, file)
    shutil.copy(exported / "config.json", tmp_path)
    assert main(["to-flax", str(file), str(tmp_path / "run")]) == 0
    _, weights = load_weights(tmp_path / "run")
    assert_same_weights(load_weights(run)[1].params, weights.params)
    assert not np.asarray(jax.tree.leaves(weights.routing_bias)[0]).any()  # the source has none: zeros


WRAPPED = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "parallel": lambda name: f"module.{name}",
    "parallel, compiled": lambda name: f"module._orig_mod.{name}",
    "compiled, parallel": lambda name: f"_orig_mod.module.{name}",
    "layers compiled and checkpointed": lambda name: re.sub(
        r"(decoder_layers\.\d\.)", r"\1_orig_mod._checkpoint_wrapped_module.", name
    ),
    "experts compiled": lambda name: re.sub(r"(routed_experts\.\d\.)", r"\1_orig_mod.", name),
    "plain": lambda name: name,
}
NESTS = (("model",), ("state_dict",), ("module",), ("model", "state_dict"))


@pytest.mark.parametrize(("wrapped", "nest"), [*((name, ()) for name in WRAPPED), *(("plain", nest) for nest in NESTS)])
def test_a_wrapped_state_dict_is_unwrapped_and_that_is_said(run, exported, tmp_path, wrapped, nest, capsys):
    torch = pytest.importorskip("torch")
    state = {
        WRAPPED[wrapped](name): torch.from_numpy(v) for name, v in load_file(exported / "model.safetensors").items()
    }
    for key in reversed(nest):
        state = {"epoch": 3, key: state, "optimizer": {"state": {}}}
    torch.save(state, tmp_path / "saved.pt")
    shutil.copy(exported / "config.json", tmp_path)
    assert main(["to-flax", str(tmp_path / "saved.pt"), str(tmp_path / "run")]) == 0
    assert_same_weights(load_weights(run)[1], load_weights(tmp_path / "run")[1])
    said = capsys.readouterr().out
    assert ("or another wrapper" in said) == (wrapped != "plain")
    assert said.count("read from its entry") == len(nest)
    assert all(repr(key) in said for key in nest)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_pickle_with_code_is_refused_and_not_run(copy, tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    file = copy / "evil.bin"
    file.write_bytes(pickle.dumps({"a": Bomb()}))
    assert main(["to-flax", str(file), str(tmp_path / "run")]) == 2
    assert "safe to read" in capsys.readouterr().err
    assert not (tmp_path / "exploded").exists()


def test_a_truncated_file_is_refused(copy, tmp_path, capsys):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert main(["to-flax", str(copy), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "model.safetensors is no complete safetensors file" in error
    assert error.count("\n") == 1


def test_an_index_cannot_name_files_elsewhere(copy, tmp_path, capsys):
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    assert main(["to-flax", str(copy), str(tmp_path / "run")]) == 2
    assert "'../secret.safetensors'" in capsys.readouterr().err


def test_nothing_is_overwritten(run, copy, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    assert main(["to-torch", str(run), str(copy)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == before


def test_an_imported_run_and_an_exported_folder_generate_and_train(exported, narrow, tmp_path, capsys):
    assert main(["to-flax", str(exported), str(tmp_path / "run")]) == 0
    texts = []
    for folder in (exported, tmp_path / "run"):
        capsys.readouterr()
        assert generation.main([str(folder), "--prompt", "def ", "--greedy", "--max-new-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert train.main([*narrow, "--run-dir", str(tmp_path / "run"), "--steps", "2"]) == 0
    assert "Resuming from step 0" in capsys.readouterr().out


def test_save_and_from_pretrained_round_trip(run, tmp_path):
    config, weights = load_weights(run)
    model = generation.load_model(run)
    save_pretrained(model, tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved")
    assert loaded.config == config
    assert_same_weights(split_model(loaded)[1:], tuple(weights))
    ids = jnp.arange(12)[None]
    np.testing.assert_array_equal(nnx.jit(lambda m: m(ids))(model), nnx.jit(lambda m: m(ids))(loaded))


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        from_pretrained(tmp_path)
