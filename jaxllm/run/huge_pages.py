"""Huge pages for train.py. Imports nothing slow."""

import contextlib
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
PROGRAMS = ("train.py", "jaxllm-train")

_RESTARTED = "JAXLLM_RESTARTED"
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_pages_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that a new process needs for huge pages; empty where they are on already, or not available.

    A training step allocates gigabytes, and Linux maps them page by page, 4 KiB each, unless a program asks for
    pages of 2 MiB, which make a step on a CPU a tenth faster. glibc's malloc asks if a tunable says so (glibc 2.35 or
    later), but reads it only when a process starts.
    """
    present = environment.get("GLIBC_TUNABLES", "")
    libc, version = platform.libc_ver()
    if TUNABLE in present or libc != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return {}
    try:
        setting = _PAGES.read_text()
    except OSError:
        return {}
    if "[madvise]" not in setting:  # always on, or never
        return {}
    return {"GLIBC_TUNABLES": ":".join(filter(None, (present, f"{TUNABLE}=1")))}


def restart_with_huge_pages() -> None:
    """Replace a process of train.py by one with the same arguments and huge pages, if that makes a difference.

    It imports everything again, which takes one to three seconds. `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` in the
    environment keeps huge pages off. A program that runs inside another one (a notebook, a debugger) is not restarted.
    """
    needed, program = huge_pages_environment(), sys.argv[0]
    own = Path(program).name in PROGRAMS and program in sys.orig_argv and not sys.gettrace()
    if not needed or not own or _RESTARTED in os.environ or not sys.executable:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(OSError):  # it also works without, only slower
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **needed, _RESTARTED: "1"})
