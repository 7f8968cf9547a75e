"""train.py restarts itself once, with huge pages, and loses nothing of its command line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from jaxllm.run import huge_pages

PROGRAM = """
import os, sys
from jaxllm.run.huge_pages import restart_with_huge_pages
print("started")
restart_with_huge_pages()
print(sys.argv[1:], os.environ.get("GLIBC_TUNABLES"))
"""


@pytest.fixture
def linux(monkeypatch, tmp_path):
    """As on a Linux with glibc, whose kernel gives huge pages to programs that ask."""
    pages = tmp_path / "enabled"
    pages.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "_PAGES", pages)
    monkeypatch.setattr(huge_pages.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return pages


def test_other_tunables_stay(linux, monkeypatch):
    assert huge_pages.huge_pages_environment() == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    assert huge_pages.huge_pages_environment() == {"GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.hugetlb=1"}
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert huge_pages.huge_pages_environment() == {}


@pytest.mark.parametrize("inside", ["restarted", "another program", "a notebook", "a debugger"])
def test_no_restart_there(linux, monkeypatch, inside):
    """Where the tunable did not survive the restart, and where the process is not train.py's own."""
    program = "ipython" if inside == "a notebook" else "train.py"
    monkeypatch.setattr(huge_pages.sys, "gettrace", lambda: print if inside == "a debugger" else None)
    monkeypatch.setattr(huge_pages.sys, "argv", [program])
    own = ["python", program]
    monkeypatch.setattr(huge_pages.sys, "orig_argv", ["python"] if inside == "another program" else own)
    monkeypatch.delenv("JAXLLM_RESTARTED", raising=False)
    started = []
    monkeypatch.setattr(huge_pages.os, "execve", lambda *args: started.append(args))
    if inside == "restarted":
        huge_pages.restart_with_huge_pages()
        assert len(started) == 1
        monkeypatch.setenv("JAXLLM_RESTARTED", started.pop()[2]["JAXLLM_RESTARTED"])
    huge_pages.restart_with_huge_pages()
    assert started == []


def test_nothing_where_it_makes_no_difference(linux, monkeypatch):
    for setting in ("[always] madvise never", "always madvise [never]"):
        linux.write_text(setting)
        assert huge_pages.huge_pages_environment() == {}
    linux.unlink()
    assert huge_pages.huge_pages_environment() == {}
    linux.write_text("always [madvise] never")
    for libc in (("", ""), ("glibc", "2.34")):
        monkeypatch.setattr(huge_pages.platform, "libc_ver", lambda libc=libc: libc)
        assert huge_pages.huge_pages_environment() == {}


HERE = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}


@pytest.mark.skipif(
    not huge_pages.huge_pages_environment(HERE), reason="huge pages are on already here, or not available"
)
def test_the_restart_keeps_the_arguments_and_happens_once(tmp_path):
    program = tmp_path / "train.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program), "--steps", "two words", ""],
        env={**HERE, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["started", "started", "['--steps', 'two words', ''] glibc.malloc.hugetlb=1"]
