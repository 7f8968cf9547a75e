"""SIGKILL at any point of a run's start: the same command is accepted, makes the same folder, and leaves nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from convert.to_flax import read_folder
from jaxllm.run import replay as replaying
from jaxllm.store.checkpoint import load_weights
from jaxllm.store.folder import SOURCE
from jaxllm.train.trainer import Trainer
from tests.test_families import V3, folder_of

ROOT = Path(__file__).parents[1]


@pytest.fixture
def deepseek(run, tmp_path) -> Path:
    """A folder of the DeepSeek family, with a tokenizer that fits."""
    folder = folder_of(tmp_path / "deepseek", V3 | {"vocab_size": 300, "eos_token_id": 0, "bos_token_id": 0})
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    shutil.copytree(run / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def survivals(framework: str, folder: Path, before: Path | str, *options: str) -> int:
    command = [sys.executable, "-m", "tests.killed_starts", framework, str(folder), str(before), *options]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["init", "new", "torch", "converted", "overwritten"])
def test_a_start_that_is_killed_anywhere_is_accepted_again(kind, narrow_model, corpus, deepseek, run, tmp_path):
    converted, options = tmp_path / "converted", [*narrow_model, "--data", str(corpus)]
    (converted / "checkpoints" / "0").mkdir(parents=True)
    (converted / "checkpoints" / "0" / "weights").write_text("")
    shutil.copy(run / "config.json", converted)
    if kind == "init":
        options = ["--init", str(deepseek), "--data", str(corpus), "--seq-len", "16", "--eval-samples", "7"]
    before = converted if kind in ("converted", "overwritten") else ""
    options += ["--overwrite"] if kind == "overwritten" else []
    options += ["--tokenizer", str(run / "tokenizer")] if kind == "converted" else []
    # each writes at least three files by a scratch folder, a file in it, a rename and the folder's removal
    assert survivals("PyTorch" if kind == "torch" else "JAX", tmp_path / "run", before, *options) >= 12


@pytest.mark.slow
def test_an_init_run_that_is_killed_before_its_first_checkpoint_starts_from_the_same_weights(
    deepseek, corpus, tmp_path, monkeypatch, capsys
):
    """Also without --init, which the run's folder keeps; and not from other weights."""
    folder = tmp_path / "run"
    options = ["--data", str(corpus), "--seq-len", "16", "--eval-samples", "7", "--steps", "1", "--learning-rate", "0"]
    options += ["--sample-tokens", "0", "--precision", "float32", "--bias-update-rate", "0", "--run-dir", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "compile", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train.main(["--init", str(deepseek), *options]) == 130
    assert train.main(["--init", str(tmp_path), *options]) == 2
    assert "it has no config.json" in capsys.readouterr().err
    other = shutil.copytree(deepseek, tmp_path / "other")
    assert train.main(["--init", str(other), *options]) == 2
    assert f"init is '{other}', and the run in {folder} started from '{deepseek}'" in capsys.readouterr().err
    assert replaying.main([str(folder), "1"]) == 2
    assert f"the run started from the weights of {deepseek}, and has no checkpoint" in capsys.readouterr().err
    shutil.rmtree(folder / SOURCE)
    assert train.main(options) == 0
    assert (folder / SOURCE / "config.json").read_bytes() == (deepseek / "config.json").read_bytes()
    kept, given = load_weights(folder)[1], read_folder(deepseek)[1]
    for name, one in given.params["decoder_layers"]["self_attn"].items():
        np.testing.assert_array_equal(
            np.asarray(kept.params["decoder_layers"]["self_attn"][name]["weight"]), one["weight"]
        )


def test_another_init_for_a_run_that_has_weights_is_refused(deepseek, run, narrow, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    assert train.main(["--init", str(deepseek), "--run-dir", str(folder)]) == 2
    assert f"the run in {folder} started from new weights: leave the option out" in capsys.readouterr().err
    (folder / "train_config.json").unlink()
    assert train.main(["--init", str(deepseek), "--run-dir", str(folder)]) == 2
    assert f"the run in {folder} started from the weights in it" in capsys.readouterr().err
