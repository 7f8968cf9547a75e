"""The verdict is about the code in the folder: the same bytes as ours, or refused, or run where the user says so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

from convert.to_torch import MODELING_FILE
from jaxllm import CustomLLM, ModelConfig, save_pretrained
from parity_tests import hf_side
from parity_tests.__main__ import main
from tests.test_families import V3, folder_of

ROOT = Path(__file__).parents[1]
SHAPE = ModelConfig(
    vocab_size=400,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    moe_intermediate_size=16,
    n_routed_experts=4,
    max_position_embeddings=64,
)
QUICK = ("--rungs", "weights", "logits", "--seq-len", "40")


@pytest.fixture
def exported(tmp_path) -> Path:
    save_pretrained(CustomLLM(SHAPE, dtype=jnp.float32, rngs=nnx.Rngs(0)), tmp_path / "exported")
    return tmp_path / "exported"


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text("a short text, repeated as often as necessary\n" * 40)
    return tmp_path / "text.txt"


def edit(file: Path, before: str, after: str) -> None:
    content = file.read_text()
    assert content.count(before) == 1
    file.write_text(content.replace(before, after))


@pytest.mark.slow
def test_the_verdict_names_the_code_that_was_compared(exported, text, tmp_path, capsys):
    arguments = [str(exported), *QUICK, "--text", str(text), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    code = f"torch_ref/model.py, which {exported / MODELING_FILE} equals byte for byte"
    assert f"PyTorch's side: {code}\n" in said
    (left_out,) = (line for line in said.splitlines() if line.startswith("Not compared: "))
    assert "layers" in left_out
    assert "gradients" in left_out
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["pytorch"] == code


def test_edited_code_is_refused_and_not_run_unless_the_user_says_so(exported, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    arguments = [str(exported), *QUICK, "--text", str(text), "--out", str(tmp_path / "out")]
    code = exported / MODELING_FILE
    ran = tmp_path / "ran"
    code.write_text(code.read_text() + f"\n\nopen({str(ran)!r}, 'w').close()\n")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {code} is not this version's torch_ref/model.py, but an older one or edited")
    assert "--trust-remote-code" in error
    assert error.count("\n") == 1
    assert not ran.exists()
    assert main([*arguments, "--trust-remote-code"]) == 0
    assert f"PyTorch's side: {code}\n" in capsys.readouterr().out
    assert ran.exists()


@pytest.mark.slow
def test_a_fault_in_the_folder_s_code_is_found(exported, text, tmp_path, capsys, monkeypatch):
    """In another process: transformers keeps modules that it has imported from a folder of that name."""
    edit(
        exported / MODELING_FILE,
        "class CustomLLM(",
        "_rms = torch.rsqrt\ntorch.rsqrt = lambda x: 1.001 * _rms(x)\n\n\nclass CustomLLM(",
    )
    command = [sys.executable, "-m", "parity_tests", str(exported), *QUICK, "--text", str(text), "--out", str(tmp_path)]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([*command, "--trust-remote-code"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"PyTorch's side: {exported / MODELING_FILE}\n" in done.stdout
    assert "BREACH, first in: logits" in done.stdout


@pytest.mark.parametrize(
    ("auto_map", "said"),
    [
        ({"AutoModelForCausalLM": "other.CustomLLM"}, "other.py is not this version's torch_ref/model.py"),
        ({"AutoModelForCausalLM": "modeling_customllm.Other"}, "as 'modeling_customllm.Other', and"),
        ({"AutoConfig": "gone.CustomLLMConfig"}, "AutoConfig as 'gone.CustomLLMConfig', which is not a class of"),
        ({"AutoModelForCausalLM": "some/repo--modeling_customllm.CustomLLM"}, "which is not a class of a file"),
        ({"AutoModelForCausalLM": None}, "AutoModelForCausalLM as None"),
        ({"AutoModel": "other.CustomLLMModel"}, "other.py is not this version's torch_ref/model.py"),
        ({"AutoModel": "modeling_customllm.CustomLLM"}, "has CustomLLMModel"),
        ({"AutoTokenizer": ["other.Slow", None]}, "AutoTokenizer as 'other.Slow', and torch_ref/model.py has no such"),
    ],
)  # fmt: skip
def test_other_code_that_config_json_names_is_refused(auto_map, said, exported, tmp_path, capsys):
    shutil.copy(exported / MODELING_FILE, exported / "other.py")
    (exported / "other.py").write_text("raise SystemExit('it ran')\n")
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(config | {"auto_map": config["auto_map"] | auto_map}))
    assert main([str(exported), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_an_error_of_the_folder_s_code_is_one_line(exported, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = exported / MODELING_FILE
    code.write_text(code.read_text() + "\n\nCustomLLM.forward = lambda self, *given, **named: [][7]\n")
    arguments = [str(exported), *QUICK, "--text", str(text), "--out", str(tmp_path / "out"), "--trust-remote-code"]
    assert main(arguments) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "Traceback"))]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {code} fails in a comparison: IndexError: list index")


def test_code_that_is_not_compared_is_named(exported, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = json.loads((exported / "config.json").read_text())
    config["auto_map"] = {name: config["auto_map"][name] for name in ("AutoConfig", "AutoModelForCausalLM")}
    config["auto_map"]["AutoModel"] = "other.CustomLLMModel"
    (exported / "config.json").write_text(json.dumps(config))
    (exported / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["slow.Slow", null]}}')
    arguments = [str(exported), *QUICK, "--text", str(text), "--out", str(tmp_path / "out"), "--trust-remote-code"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "; not other.CustomLLMModel, which auto_map names too" in said
    assert f"; not the code that {exported / 'tokenizer_config.json'} names in auto_map" in said


def test_a_folder_without_code_is_compared_with_ours_by_name(exported, text, tmp_path, capsys):
    config = json.loads((exported / "config.json").read_text())
    del config["auto_map"]
    (exported / "config.json").write_text(json.dumps(config))
    (exported / MODELING_FILE).unlink()
    arguments = [str(exported), *QUICK, "--text", str(text), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert f"torch_ref/model.py ({exported / 'config.json'} names no code)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_folder_of_the_deepseek_family_is_loaded_by_transformers_itself(text, tmp_path, capsys, monkeypatch):
    """Its own weights, not an export of what was read; its own code is named as not compared."""
    monkeypatch.setattr(hf_side, "write_model", None)
    folder = folder_of(tmp_path / "v3", V3 | {"vocab_size": 400})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_deepseek.Model"}}))
    arguments = [str(folder), *QUICK, "--text", str(text), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "PyTorch's side: DeepseekV3ForCausalLM of transformers" in said
    assert f"not the code that {folder / 'config.json'} names in auto_map" in said


@pytest.mark.parametrize("module", ["parity_tests", "torch_ref.train"])
def test_help_needs_no_pytorch_and_the_rest_says_what_is_missing(module, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "hiding"), "HIDDEN": "torch accelerate"}
    command = [sys.executable, "-m", module]
    helped = subprocess.run([*command, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert helped.returncode == 0, helped.stderr
    assert "--precision" in helped.stdout
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: PyTorch is not installed")
    assert done.stderr.count("\n") == 1
