"""Whatever a shell, a folder or an installation holds: the same numbers, or one line that says what is in the way."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from convert import __main__ as convert
from jaxllm import CustomLLM
from jaxllm.config import TrainConfig
from jaxllm.model import numerics
from jaxllm.model.decoding import Sampling, generate
from jaxllm.train.state import init_state
from tests.fingerprint import fingerprint
from tests.test_generate import SMALL

ROOT = Path(__file__).parents[1]
OTHERS = {
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_RANDOM_SEED_OFFSET": "7",
    "JAX_HIGH_DYNAMIC_RANGE_GUMBEL": "1",
    "JAX_SOFTMAX_CUSTOM_JVP": "1",
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}
"""For each setting that is pinned, another value."""


def command(*arguments: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *map(str, arguments)]
    paths = {"PYTHONPATH": str(ROOT)}
    return subprocess.run(line, cwd=cwd, env=os.environ | paths | environment, capture_output=True, text=True)


def test_there_is_another_value_for_each_pinned_setting():
    assert {name.lower() for name in OTHERS} == numerics.PINNED.keys()
    assert all(jax.config.values[name] == value for name, value in numerics.PINNED.items())  # JAX's defaults


@pytest.mark.slow
def test_a_shell_s_settings_change_no_sample_and_are_named(run):
    arguments = ["-m", "jaxllm.generate", run, "--prompt", "def ", "--max-new-tokens", "20", "--temperature", "1"]
    plain, other = command(*arguments), command(*arguments, **OTHERS)
    assert plain.returncode == other.returncode == 0, other.stderr
    assert other.stdout == plain.stdout
    assert plain.stderr == ""
    (line,) = other.stderr.splitlines()
    assert line.startswith("Not used, because they change numbers: ")
    assert all(f"{name}=" in line for name in OTHERS)


@pytest.mark.slow
def test_a_run_trains_and_resumes_with_the_same_numbers_in_any_shell(narrow, run, tmp_path):
    arguments = ["train.py", *narrow, "--run-dir", tmp_path / "run"]
    plain = ["train.py", *narrow, "--run-dir", tmp_path / "plain"]
    assert command(*arguments, "--steps", "9", **OTHERS).returncode == 0
    assert command(*arguments, "--steps", "20", **OTHERS).returncode == 0
    assert command(*plain, "--steps", "9").returncode == 0
    assert command(*plain, "--steps", "20").returncode == 0
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "plain")


@pytest.mark.parametrize("module", ["jaxllm.generate", pytest.param("jaxllm.plan.compile", marks=pytest.mark.slow)])
def test_jit_that_is_turned_off_is_named(module, run):
    done = command("-m", module, run, JAX_DISABLE_JIT="1")
    assert done.stderr.splitlines()[-1].endswith("JAX_DISABLE_JIT is set: this program needs jax.jit, unset it")
    assert done.returncode != 0


@pytest.mark.slow
def test_the_library_s_keys_and_samples_are_pinned_where_nothing_else_is():
    small = dataclasses.replace(SMALL, num_hidden_layers=1)
    model, config = CustomLLM(small, rngs=nnx.Rngs(0)), TrainConfig.from_options(model=small)

    def numbers() -> tuple[list[list[int]], np.ndarray, np.ndarray]:
        state = init_state(config.model, config.optim, config.seed)
        return (
            generate(model, [[1, 2]], 8, Sampling(), seed=2**40 + 1),
            np.asarray(state.dropout_key),
            np.asarray(state.params["token_embeddings"]["weight"]),
        )

    plain = numbers()
    with jax.default_prng_impl("rbg"), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        other = numbers()
    with jax.threefry_partitionable(False):
        assert generate(model, [[1, 2]], 8, Sampling(), seed=2**40 + 1) == plain[0]
    assert other[0] == plain[0]
    np.testing.assert_array_equal(other[1], plain[1])
    np.testing.assert_array_equal(other[2], plain[2])


# ---- a working folder with the user's own modules


@pytest.fixture(params=["file", pytest.param("package", marks=pytest.mark.slow)])
def working_folder(request, tmp_path) -> Path:
    """Holds modules named as this project's top-level ones, each of which says so when it runs."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("convert", "train", "torch_ref", "parity_tests"):
        file = folder / f"{name}.py"
        if request.param == "package":
            (folder / name).mkdir()
            file = folder / name / "__init__.py"
        file.write_text("print('the user runs')\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("module", ["jaxllm.generate", pytest.param("jaxllm.evaluate", marks=pytest.mark.slow)])
def test_commands_work_on_a_run_among_a_user_s_own_modules(module, run, working_folder, tmp_path):
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 9)
    options = ["--prompt", "def ", "--max-new-tokens", "2"]
    options = options if module == "jaxllm.generate" else ["--data", tmp_path / "text.txt"]
    done = command("-m", module, run, *options, cwd=working_folder)
    assert done.returncode == 0, done.stderr
    assert "the user runs" not in done.stdout


@pytest.mark.slow
def test_a_user_s_module_that_hides_one_that_is_needed_is_named(run, working_folder, tmp_path):
    assert convert.main(["to-torch", str(run), str(tmp_path / "exported")]) == 0
    hides = working_folder / "convert"
    hides = hides if hides.is_dir() else hides.with_suffix(".py")
    said = f"{hides} hides this project's 'convert', which is needed here"
    done = command("-m", "jaxllm.generate", tmp_path / "exported", cwd=working_folder)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1
    missing = command("-m", "jaxllm.generate", tmp_path / "nowhere", cwd=working_folder)
    assert "nowhere' is neither a run folder nor an exported model" in missing.stderr
    done = command("-c", "from jaxllm import load_model, from_pretrained", cwd=working_folder)
    assert done.stderr.splitlines()[-1].startswith(f"jaxllm.errors.UserError: {said}")
    for name, package in (("train", "train"), ("convert", "convert"), ("parity", "parity_tests")):
        program = f"import sys; from jaxllm.commands import {name}; sys.exit({name}())"
        done = command("-c", program, "--help", cwd=working_folder)
        assert done.returncode == 2
        assert f"hides this project's '{package}'" in done.stderr
        assert "the user runs" not in done.stdout


def test_the_export_carries_this_project_s_code_among_a_user_s_own(run, tmp_path):
    (tmp_path / "torch_ref.py").write_text("print('the user runs')\n")
    done = command("-m", "convert", "to-torch", run, tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {tmp_path / 'torch_ref.py'} hides this project's 'torch_ref', which is needed here: rename it, or "
        "work in another folder\n"
    )


def test_installed_commands_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for target in project["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), target
