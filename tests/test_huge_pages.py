"""A program restarts itself once, with huge pages, and loses nothing of its command line; train.py does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.run import runtime

PROGRAM = """
import os, sys
from jaxllm.run.runtime import restart_with_huge_pages
print("started", flush=True)
restart_with_huge_pages()
print(sys.argv[1:], os.environ.get("GLIBC_TUNABLES"))
"""


@pytest.fixture
def linux(monkeypatch, tmp_path):
    """As on a Linux with glibc, whose kernel gives huge pages to programs that ask."""
    pages = tmp_path / "enabled"
    pages.write_text("always [madvise] never\n")
    monkeypatch.setattr(runtime, "_PAGES", pages)
    monkeypatch.setattr(runtime.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return pages


def test_other_tunables_stay(linux, monkeypatch):
    assert runtime.huge_pages_environment() == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    assert runtime.huge_pages_environment() == {"GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.hugetlb=1"}
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert runtime.huge_pages_environment() == {}


@pytest.mark.parametrize("inside", ["restarted", "another program", "a debugger"])
def test_no_restart_there(linux, monkeypatch, inside):
    """Where the tunable did not survive the restart, and where the process is not this program's own."""
    monkeypatch.setattr(runtime.sys, "gettrace", lambda: print if inside == "a debugger" else None)
    monkeypatch.setattr(runtime.sys, "argv", ["train.py"])
    own = ["python", "train.py"]
    monkeypatch.setattr(runtime.sys, "orig_argv", ["python"] if inside == "another program" else own)
    monkeypatch.delenv("JAXLLM_RESTARTED", raising=False)
    started = []
    monkeypatch.setattr(runtime.os, "execve", lambda *args: started.append(args))
    if inside == "restarted":
        runtime.restart_with_huge_pages()
        assert len(started) == 1
        monkeypatch.setenv("JAXLLM_RESTARTED", started.pop()[2]["JAXLLM_RESTARTED"])
    runtime.restart_with_huge_pages()
    assert started == []


def test_nothing_where_it_makes_no_difference(linux, monkeypatch):
    for setting in ("[always] madvise never", "always madvise [never]"):
        linux.write_text(setting)
        assert runtime.huge_pages_environment() == {}
    linux.unlink()
    assert runtime.huge_pages_environment() == {}
    linux.write_text("always [madvise] never")
    for libc in (("", ""), ("glibc", "2.34")):
        monkeypatch.setattr(runtime.platform, "libc_ver", lambda libc=libc: libc)
        assert runtime.huge_pages_environment() == {}


@pytest.mark.skipif(not runtime.huge_pages_environment(), reason="huge pages are on already here, or cannot be had")
def test_the_restart_keeps_the_arguments_and_happens_once(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program), "--steps", "two words", ""],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["started", "started", "['--steps', 'two words', ''] glibc.malloc.hugetlb=1"]


def test_train_py_restarts_before_its_slow_imports():
    lines = (Path(__file__).parents[1] / "train.py").read_text().splitlines()
    restart = lines.index("    restart_with_huge_pages()  # before the imports that take seconds")
    assert restart < lines.index("from flax import nnx")
