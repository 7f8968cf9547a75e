"""What is compiled before the first step, and what the next process need not compile and train again."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxllm import files as cache
from jaxllm.config import TrainConfig
from jaxllm.config.groups import DataConfig
from jaxllm.data import tokenizer as tokenizers
from jaxllm.data.file_source import FileSource
from jaxllm.data.folder import DataFiles
from jaxllm.data.tokenizer import train_or_recall_tokenizer
from jaxllm.model.batch import TokenBatch
from jaxllm.run.arguments import parse_args
from jaxllm.run.runtime import use_compilation_cache
from jaxllm.train.computation import Computation
from jaxllm.train.optim import StepNumbers
from jaxllm.train.placement import OneDevice, OnMesh, compile_programs, shared_programs
from jaxllm.train.trainer import Trainer

PROCESS = """
import collections, json, sys
from jax import monitoring

counts = collections.Counter()
monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
import train

assert train.main(sys.argv[1:]) == 0
print(json.dumps(counts))
"""


@pytest.mark.slow
def test_a_second_process_reuses_programs_and_tokenizer(narrow, tmp_path):
    """Neither one that starts over, nor one that resumes."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["JAXLLM_CACHE_DIR"] = str(tmp_path / "cache")
    counts, programs, outputs = [], [], []
    for name in ("one", "two", "resumed"):
        if name == "resumed":
            shutil.copytree(tmp_path / "one", tmp_path / name)
            shutil.rmtree(tmp_path / name / "checkpoints" / "2")
        arguments = [*narrow, "--steps", "2", "--save-every", "1", "--run-dir", str(tmp_path / name)]
        arguments += ["--sample-tokens", "0"]
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, *arguments],
            cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(done.stdout)
        counts.append(json.loads(done.stdout.splitlines()[-1]))
        programs.append({p.name for p in (tmp_path / "cache" / "xla").glob("*-cache")})
    main = ("jit_init_state", "jit_train_step", "jit_eval_step")
    assert all(sum(p.startswith(name) for p in programs[0]) == 1 for name in main), programs[0]
    for later in programs[1:]:
        assert {p for p in later if p.startswith(main)} == {p for p in programs[0] if p.startswith(main)}
    assert counts[0].get("cache_hits", 0) == 0
    assert counts[1]["cache_hits"] >= 3  # first weights, step, evaluation
    assert counts[2]["cache_hits"] >= 2
    assert "Resuming from step 1" in outputs[2]
    assert ["Training a tokenizer" in output for output in outputs] == [True, False, False]


@pytest.fixture
def _unconfigured():
    """JAX without a configured cache."""
    names = [name for name in jax.config.values if "compilation_cache" in name or "persistent_cache" in name]
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("_unconfigured")
def test_the_environment_sets_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("JAXLLM_CACHE_DIR")
    assert cache.cache_folder("xla") == tmp_path / "xdg" / "jaxllm" / "xla"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "home" / ".cache" / "jaxllm" / "xla")


@pytest.mark.usefixtures("_unconfigured")
def test_an_unwritable_cache_is_reported_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXLLM_CACHE_DIR", str(tmp_path / "file"))
    use_compilation_cache()
    assert capsys.readouterr().err.count("\n") == 1
    assert jax.config.jax_compilation_cache_dir is None


def test_a_cache_that_the_user_configured_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLLM_CACHE_DIR", str(tmp_path / "other"))
    before = jax.config.jax_compilation_cache_dir
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("accumulation", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_the_step_updates_the_state_in_place(narrow, accumulation):
    """Donation is a request: XLA must have granted it for every array of the state."""
    config = parse_args([*narrow, "--grad-accum", accumulation], "test", None, TrainConfig)
    computation = Computation.of(config)
    state = jax.jit(computation.init_state)()
    step = compile_programs(OneDevice(), computation).step
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert step.memory_analysis().alias_size_in_bytes >= size
    rows = np.zeros((config.data.grad_accum, config.data.batch_size, config.data.seq_len), np.int32)
    after, _ = step(state, TokenBatch(rows), StepNumbers.of(config.optim, config.schedule))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert int(after.step) == 1


NUMBERS = (
    "--steps", "9", "--warmup-steps", "3", "--learning-rate", "1e-3", "--max-grad-norm", "0.1", "--run-dir", "other",
)  # fmt: skip
"""Options of a run that no program depends on; `tests/test_step.py` and the ladder see that a step reads them."""


def test_runs_of_one_process_share_programs_and_keep_no_arrays(narrow):
    """What no program depends on does not matter, what one depends on does."""
    first, *others = (
        parse_args([*narrow, *options], "test", None, TrainConfig)
        for options in ((), ("--save-every", "7", *NUMBERS), ("--seed", "1"))
    )
    rows = np.zeros((first.data.batch_size, first.data.seq_len), np.int32)
    trainer = Trainer(first)
    trainer.compile()
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    trainer.step(trainer.init(), rows)
    programs = shared_programs(trainer.placement, trainer.computation)
    del trainer
    gc.collect()
    assert {id(array) for array in jax.live_arrays()} <= before
    same, seeded = map(Trainer, others)
    assert shared_programs(same.placement, same.computation) is programs
    assert same.compile() < 0.1
    assert seeded.computation != same.computation
    assert OneDevice() != OnMesh(OneDevice.layout)


def test_a_tokenizer_is_cached_by_text_and_size(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXLLM_CACHE_DIR", str(tmp_path))

    def make(size: int = 300, files: int = 25) -> str:
        capsys.readouterr()
        found = DataFiles(corpus, {file.name: file for file in sorted(corpus.iterdir())[:files]})
        made = train_or_recall_tokenizer(FileSource(found, DataConfig(), 0), size, "here")
        assert (made.eos_token, len(made)) == (tokenizers.END_OF_TEXT, size)
        assert made.decode(made("def x():\n")["input_ids"]) == "def x():\n"
        return capsys.readouterr().out

    said = "Training a tokenizer of 300 tokens on here"
    assert said in make()
    assert make() == ""
    assert "of 280 tokens" in make(size=280)
    assert said in make(files=24)
    assert make() == ""
    for file in (tmp_path / "tokenizers").iterdir():
        file.write_text(file.read_text()[:50])
    assert said in make()  # damaged: made anew
    assert make() == ""
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXLLM_CACHE_DIR", str(tmp_path / "file"))
    assert said in make()
    assert said in make()
