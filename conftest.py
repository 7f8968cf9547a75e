"""For all tests: programs that several tests compile are compiled once, and so are a small corpus and a narrow run."""

from __future__ import annotations

import functools
import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from matplotlib.figure import Figure

import train
from jaxllm.run import reporting
from jaxllm.run import run as running
from jaxllm.run.signals import STOPPING
from jaxllm.train import trainer
from jaxllm.train.computation import Computation
from jaxllm.train.placement import OneDevice, Placement

jax.config.update("jax_num_cpu_devices", 8)  # for `test_parallel.py`, before the first use of a device

NARROW = (
    "--model.hidden-size", "32", "--model.num-hidden-layers", "2", "--model.num-attention-heads", "2",
    "--model.moe-intermediate-size", "24", "--model.n-routed-experts", "4", "--model.vocab-size", "300",
    "--model.max-position-embeddings", "64", "--seq-len", "16", "--batch-size", "4", "--log-every", "1",
    "--eval-samples", "7", "--sample-tokens", "8",
    "--precision", "float32", "--optimizer", "adamw", "--learning-rate", "4e-3",  # compiles faster than the default
)  # fmt: skip


def write_corpus(folder: Path, files: int = 25) -> Path:
    folder.mkdir()
    for i in range(files):
        lines = [f"def function_{i}_{j}(x):\n    return x + {j}\n\n" for j in range(30)]
        (folder / f"module_{i:02d}.py").write_text("".join(lines))
    return folder


QUICK_COMPILATION = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):  # later versions do not have the flag, and end the process
    QUICK_COMPILATION += " --xla_cpu_use_fusion_emitters=false"


def pytest_configure(config) -> None:
    """Compile quickly: most of the tests' time goes into XLA and LLVM, and the programs are small.

    Not for `slow` and `gpu_compile`, which look at real programs. `.ci/run` trains and compares as a user does.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a background job of a script; its children would ignore it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.markexpr == "not slow and not gpu_compile":
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILATION}"
        os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")  # else train.py would restart itself
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads of two workers wait for each other
        gc.set_threshold(50_000, 50, 50)  # tracing makes many objects: this saves a sixth of its time


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="session")
def narrow_model() -> tuple[str, ...]:
    """Arguments of a run that takes seconds, without its data and steps."""
    return NARROW


@pytest.fixture(scope="session")
def narrow(corpus) -> tuple[str, ...]:
    """Arguments of a run that takes seconds."""
    return (*NARROW, "--data", str(corpus), "--steps", "20", "--save-every", "10", "--eval-every", "10")


@pytest.fixture(scope="session")
def run(narrow, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "narrow"
    assert train.main([*narrow, "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def signals_by_default():
    """Here and in processes that the test starts; `nohup` and background jobs start pytest with some ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPPING}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    os.environ["JAXLLM_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))  # not the user's; processes inherit it
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    # in this process, and in those that tests start
    jax.config.update("jax_compilation_cache_dir", str(shared / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(shared / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session", autouse=True)
def _share_programs():
    """Runs in this process whose programs are equal share them and their first state, which take seconds to trace.

    They share what else follows from their config, too. `placement.compile_programs`, which the tests of layouts call,
    compiles anew.
    """
    with pytest.MonkeyPatch.context() as patch:
        compiled = _once_per_program(trainer.compile_programs)
        patch.setattr(trainer, "compile_programs", compiled)
        init = _once_per_program(OneDevice.init)
        patch.setattr(OneDevice, "init", lambda *args: jax.tree.map(jnp.copy, init(*args)))  # the step deletes it
        for name in ("module_tree", "measured_peak_tflops"):
            patch.setattr(running, name, functools.cache(getattr(running, name)))
        yield


def _once_per_program(function: Callable) -> Callable:
    """Call `function(placement, computation)` once for all equal computations."""
    results = {}

    def shared(placement: Placement, computation: Computation) -> Any:
        key = (type(placement), placement.layout, computation)
        if key not in results:
            results[key] = function(placement, computation)
        return results[key]

    return shared


@pytest.fixture(scope="session", autouse=True)
def _draw_once():
    """The first picture of a run's losses is drawn, which takes half a second; the later ones are copies of it."""
    pictures, new_figure = [], reporting.new_figure

    def figure(**options: Any) -> Figure:
        made = new_figure(**options)
        draw = made.savefig

        def save(file: Path, **options: Any) -> None:
            if pictures:
                file.write_bytes(pictures[0])
            else:
                draw(file, **options)
                pictures.append(file.read_bytes())

        made.savefig = save
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "new_figure", figure)
        yield
