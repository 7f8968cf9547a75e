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
from convert import write_files
from convert.__main__ import main
from convert.to_flax import read_folder, read_weights
from convert.to_torch import write_model
from jaxllm import CustomLLM, UserError, for_inference, from_pretrained, save_pretrained
from jaxllm import generate as generation
from jaxllm.model.decoder import split_model
from jaxllm.store.checkpoint import load_weights
from jaxllm.store.checkpoint_writer import write_run
from jaxllm.store.metrics_file import read_metrics


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
    monkeypatch.setattr(write_files, "MAX_SHARD_BYTES", 50_000)
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
        "of another shape: token_embeddings.weight [299, 32] instead of [300, 32]",
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
    assert "model.safetensors is not a complete safetensors file" in error
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


@pytest.mark.slow
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
    with pytest.raises(UserError, match=r"has no config\.json"):
        from_pretrained(tmp_path)


# several sets of weight files


def as_shards(folder: Path, ending: str, shift: float = 0.0) -> Path:
    """Two shards of a folder's weights and their index, next to its single file; with `shift`, of other numbers."""
    tensors = {name: values + np.float32(shift) for name, values in load_file(folder / "model.safetensors").items()}
    weight_map = {}
    for shard, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        file = f"part-{shard}.{ending}"
        if ending == "safetensors":
            save_file({name: tensors[name] for name in part}, folder / file)
        else:
            torch = pytest.importorskip("torch")
            torch.save({name: torch.from_numpy(tensors[name]) for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}[ending]
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def read(folder: Path):
    return read_folder(folder)[1]


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_are_read_and_a_missing_one_is_named(ending, run, copy):
    as_shards(copy, ending)
    (copy / "model.safetensors").unlink()
    assert_same_weights(load_weights(run)[1], read(copy))
    (copy / f"part-1.{ending}").unlink()
    with pytest.raises(UserError, match=f"names the file 'part-1.{ending}', which the folder does not hold"):
        read(copy)


def test_equal_shards_next_to_the_single_file_are_said_and_others_refused(run, copy, capsys):
    as_shards(copy, "safetensors")
    assert_same_weights(load_weights(run)[1], read(copy))
    assert "model.safetensors is read, and compared with the shards" in capsys.readouterr().err
    as_shards(copy, "safetensors", shift=1.0)
    with pytest.raises(
        UserError, match=r"two sets of weights that differ, .*; they differ in [^,]+, [^,]+, [^,]+ and \d+ more$"
    ):
        read(copy)
    with pytest.raises(UserError, match="two sets of weights"):
        from_pretrained(copy)


@pytest.mark.parametrize("gone", [("part-0.safetensors", "part-1.safetensors"), ("part-1.safetensors",)])
def test_a_stale_index_does_not_hide_the_single_file(gone, run, copy, capsys):
    as_shards(copy, "safetensors", shift=1.0)
    for name in gone:
        (copy / name).unlink()
    assert_same_weights(load_weights(run)[1], read(copy))
    assert f"model.safetensors is read; model.safetensors.index.json is out of date, it names {', '.join(gone)}" in (
        capsys.readouterr().err
    )


def test_safetensors_go_before_pytorch_s_files_as_in_transformers(run, copy, capsys):
    as_shards(copy, "bin", shift=1.0)
    assert_same_weights(load_weights(run)[1], read(copy))
    assert "not read: pytorch_model.bin.index.json" in capsys.readouterr().err
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True).state_dict()
    ours = load_file(copy / "model.safetensors")
    np.testing.assert_array_equal(theirs["lm_head.bias"].numpy(), ours["lm_head.bias"])


# what is written


UNFIT = {
    "bits of bfloat16": (lambda x: x.astype(jnp.bfloat16).view(np.uint16), "has the dtype uint16"),
    "integers": (lambda x: x.astype(np.int32), "has the dtype int32"),
    "truth values": (lambda x: x > 0, "has the dtype bool"),
    "complex": (lambda x: x.astype(np.complex64), "has the dtype complex64"),
    "not a number": (lambda x: np.where(np.arange(x.size).reshape(x.shape) == 3, np.nan, x), "that are not finite"),
    "infinity": (lambda x: np.where(np.arange(x.size).reshape(x.shape) == 3, np.inf, x), "that are not finite"),
}


def spoilt(weights, leaf: int, spoil) -> tuple:
    leaves, tree = jax.tree.flatten(weights)
    leaves[leaf] = spoil(np.asarray(leaves[leaf]))
    return jax.tree.unflatten(tree, leaves)


@pytest.mark.parametrize("leaf", [0, *(pytest.param(leaf, marks=pytest.mark.slow) for leaf in (7, -1))])
@pytest.mark.parametrize("what", UNFIT)
def test_no_leaf_reaches_a_file_without_its_dtype_and_values_checked(what, leaf, run, tmp_path):
    config, weights = load_weights(run)
    spoil, message = UNFIT[what]
    bad = spoilt(weights, leaf, spoil)
    model = nnx.merge(split_model(generation.load_model(run))[0], *bad)
    for write in (
        lambda: save_pretrained(model, tmp_path / "out"),
        lambda: write_model(config, bad, tmp_path / "out", "bfloat16"),
        lambda: write_run(tmp_path / "out", config, bad),
    ):
        with pytest.raises(UserError, match=message) as refused:
            write()
        assert "\n" not in str(refused.value)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_value_that_the_dtype_cannot_hold_is_refused(run, tmp_path):
    config, weights = load_weights(run)
    large = spoilt(weights, 3, lambda x: x + np.float32(70_000))
    write_model(config, large, tmp_path / "wide", "bfloat16")
    with pytest.raises(UserError, match=r"7e.04, which float16 cannot hold: pass the dtype bfloat16 or float32"):
        write_model(config, large, tmp_path / "out", "float16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_for_inference_is_exported_with_its_values(dtype, exported, tmp_path):
    model = for_inference(from_pretrained(exported, dtype="bfloat16"))
    save_pretrained(model, tmp_path / "out", dtype=dtype)
    masters, found = (load_file(folder / "model.safetensors") for folder in (exported, tmp_path / "out"))
    for name, values in masters.items():
        whole = dtype == "float32" and (values.ndim == 1 or "router" in name)  # norms, biases, routers are not narrowed
        expected = values if whole else values.astype(jnp.bfloat16)
        np.testing.assert_array_equal(found[name].astype(np.float32), expected.astype(np.float32), err_msg=name)
        assert found[name].dtype.name == dtype


# dtypes that are asked for


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, jnp.dtype("float32")])
def test_a_dtype_is_written_as_by_its_name(dtype, run, tmp_path):
    save_pretrained(generation.load_model(run), tmp_path / "object", dtype=dtype)
    save_pretrained(generation.load_model(run), tmp_path / "name", dtype=jnp.dtype(dtype).name)
    for file in (tmp_path / "name").iterdir():
        assert (tmp_path / "object" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("dtype", ["int8", np.int32, bool, "float8_e4m3fn", "complex64", "float16", "float64", None])
def test_a_dtype_that_models_do_not_compute_in_is_refused(dtype, exported, run):
    config = load_weights(run)[0]
    for make in (
        lambda: from_pretrained(exported, dtype=dtype),
        lambda: generation.load_model(run, dtype),
        lambda: generation.load_model(exported, dtype),
        lambda: CustomLLM(config, dtype=dtype, rngs=nnx.Rngs(0)),
    ):
        with pytest.raises(UserError, match=r"(dtype|precision) is .*: choose one of float32, bfloat16$"):
            make()


@pytest.mark.parametrize("dtype", ["int8", "float64", "float8_e4m3fn", None, np.float64, jnp.int32])
def test_a_dtype_that_is_not_written_is_refused(dtype, run, tmp_path):
    with pytest.raises(UserError, match=r"dtype is .*: choose one of float32, bfloat16, float16"):
        save_pretrained(generation.load_model(run), tmp_path / "out", dtype=dtype)
