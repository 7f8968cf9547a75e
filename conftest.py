"""For all tests: quick compilation and its cache, a small corpus, and a narrow run."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import jax
import pytest

import train
from jaxllm.run.signals import STOPPING
from tests.configs import NARROW

jax.config.update("jax_num_cpu_devices", 8)  # for `test_parallel.py`, before the first use of a device


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
