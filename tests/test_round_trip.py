"""A folder of the DeepSeek family in and out again: weights bit for bit, every other file byte for byte or named."""

from __future__ import annotations

import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.to_flax import import_run
from convert.to_torch import export_run, torch_tensors
from convert.write_files import DTYPES
from jaxllm.config.families import is_interleaved, read_config
from jaxllm.files import write_json
from parity_tests.deepseek_cases import CASES
from tests.test_families import V3, numbered_weights

INDEX = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}
SINGLE = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}

TOKENIZERS = {
    "tokenizer.json": ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    "tiktoken": ("tiktoken.model", "tokenization_moonshot.py", "tokenizer_config.json"),
    "qwen": ("qwen.tiktoken", "tokenization_qwen.py"),
    "SentencePiece": ("tokenizer.model", "added_tokens.json"),
    "bytes": ("vocab.json", "merges.txt"),
    "WordPiece": ("vocab.txt", "tokenizer_config.json"),
    "tekken": ("tekken.json", "chat_template.json"),
    "none": (),
}
OTHERS = (
    "generation_config.json", "LICENSE", "README.md", "modeling_deepseek.py", "helper.py", "figures/benchmark.png",
    "additional_chat_templates/rag.jinja", "preprocessor_config.json",
)  # fmt: skip


def fused(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with experts joined, as transformers 5 has them in memory."""
    joined: dict[str, list[np.ndarray]] = {}
    rest = {}
    for name, values in tensors.items():
        before, found, after = name.partition(".mlp.experts.")
        if not found:
            rest[name] = values
            continue
        linear = after.split(".")[1]
        other = tensors[name.replace("gate_proj", "up_proj")]
        if linear == "gate_proj":
            joined.setdefault(f"{before}{found}gate_up_proj", []).append(np.concatenate([values, other]))
        elif linear == "down_proj":
            joined.setdefault(f"{before}{found}down_proj", []).append(values)
    return rest | {name: np.stack(parts) for name, parts in joined.items()}


def save(tensors: dict[str, np.ndarray], folder: Path, form: str, shards: int) -> None:
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = SINGLE[form] if shards == 1 else f"part-{shard}-of-{shards}.{form}"
        part = {name: np.ascontiguousarray(tensors[name]) for name in names[shard::shards]}
        weight_map |= dict.fromkeys(part, file)
        if form == "safetensors":
            save_file(part, folder / file)
        else:
            import torch

            bits = {name: torch.from_numpy(values.view(f"u{values.itemsize}")) for name, values in part.items()}
            torch.save({name: bits[name].view(getattr(torch, part[name].dtype.name)) for name in part}, folder / file)
    if shards > 1:
        write_json(folder / INDEX[form], {"metadata": {}, "weight_map": weight_map})


def bits(values: np.ndarray) -> tuple[str, bytes]:
    return values.dtype.name, np.ascontiguousarray(values).tobytes()


def check_round_trip(name: str, rng: random.Random, folder: Path) -> None:
    """Write a folder of a case in a form that is drawn, convert it there and back, and compare everything."""
    case: dict[str, Any] = dict(CASES[name])
    dtype = rng.choice([*DTYPES])
    if rng.random() < 0.7:
        case["torch_dtype"] = dtype
    if rng.random() < 0.3:
        case["quantized_by"] = None  # an unknown key
    case["auto_map"] = {"AutoModelForCausalLM": "modeling_deepseek.Model"}
    config = read_config(case)
    tensors = {
        tensor.name: np.asarray(tensor.read(), DTYPES[tensor.dtype])
        for tensor in torch_tensors(config, numbered_weights(config), dtype, is_interleaved(case))
    }
    if rng.random() < 0.3:  # routers in float32, as some trainers save them
        tensors = {key: v.astype(np.float32) if key.endswith("mlp.gate.weight") else v for key, v in tensors.items()}
    stored = fused(tensors) if rng.random() < 0.4 else dict(tensors)
    if case.get("tie_word_embeddings") and rng.random() < 0.5:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    source = folder / "in"
    source.mkdir(parents=True)
    form = rng.choice(["safetensors", "safetensors", "bin"])
    save(stored, source, form, rng.choice([1, 3]))
    write_json(source / "config.json", case)
    kind = rng.choice([*TOKENIZERS])
    for other in (*TOKENIZERS[kind], *rng.sample(OTHERS, rng.randint(0, len(OTHERS)))):
        (source / other).parent.mkdir(exist_ok=True)
        content = json.dumps({"name": other, "eos_token_id": 3}, indent=rng.choice([None, 1, 4])).encode()
        (source / other).write_bytes(content if other.endswith(".json") else rng.randbytes(40) + b"\r\n")

    with contextlib.redirect_stdout(said := io.StringIO()):
        import_run(source, folder / "run")
        export_run(folder / "run", folder / "out")
    found = load_file(folder / "out" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for key, values in tensors.items():
        assert bits(found[key]) == bits(values), key
    for file in source.rglob("*"):
        path = file.relative_to(source).as_posix()
        if file.is_dir() or path in (SINGLE[form], INDEX[form]) or path.startswith("part-"):
            continue
        same = (folder / "out" / path).exists() and (folder / "out" / path).read_bytes() == file.read_bytes()
        assert same or path in said.getvalue(), path
        assert same or path in ("config.json", "README.md"), path
    written = json.loads((folder / "out" / "config.json").read_text())
    for key, value in case.items():  # what the config says of the model is as it was
        code = key == "auto_map" and not (source / "modeling_deepseek.py").exists()
        assert written.get(key, value) == value or f"{key} is" in said.getvalue(), key
        assert code or key in written
    assert read_config(written) == config


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if i % 3 == 0 else pytest.mark.slow) for i, name in enumerate(CASES)]
)
def test_a_folder_in_and_out_again(name, tmp_path):
    pytest.importorskip("torch")
    check_round_trip(name, random.Random(name), tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_files_of_one_dtype_and_the_config_s_own_word_stay(dtype, tmp_path, capsys):
    case = V3 | {"torch_dtype": "float32"}
    config = read_config(case)
    tensors = {
        tensor.name: np.asarray(tensor.read(), DTYPES[dtype])
        for tensor in torch_tensors(config, numbered_weights(config), dtype)
    }
    (tmp_path / "in").mkdir()
    save(tensors, tmp_path / "in", "safetensors", 1)
    write_json(tmp_path / "in" / "config.json", case)
    import_run(tmp_path / "in", tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    assert {key: bits(v) for key, v in load_file(tmp_path / "out" / "model.safetensors").items()} == {
        key: bits(values) for key, values in tensors.items()
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    assert "correction biases" not in capsys.readouterr().out

    export_run(tmp_path / "run", tmp_path / "asked", dtype="bfloat16")
    assert json.loads((tmp_path / "asked" / "config.json").read_text())["torch_dtype"] == "bfloat16"

    write_json(tmp_path / "run" / "train_config.json", {})  # as after training
    export_run(tmp_path / "run", tmp_path / "trained")
    found = load_file(tmp_path / "trained" / "model.safetensors")
    assert {v.dtype.name for key, v in found.items() if key.endswith("e_score_correction_bias")} == {"float32"}
    assert {v.dtype.name for key, v in found.items() if not key.endswith("e_score_correction_bias")} == {dtype}
    assert "The correction biases are in float32" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300))
def test_any_folder_in_and_out_again(seed, tmp_path):
    rng = random.Random(seed)
    check_round_trip(rng.choice([*CASES]), rng, tmp_path)
