"""Huge pages for everything that is allocated: on a CPU, a tenth of a training step's time.

A step allocates gigabytes anew, and Linux fills them in page by page, 4 KiB each, unless a program asks for pages of
2 MiB. glibc's malloc asks if it is told to (glibc 2.35, tunable `glibc.malloc.hugetlb`), but reads that only when a
process starts.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
_RESTARTED = "JAXLLM_RESTARTED"
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment() -> dict[str, str]:
    """The variables that a new process needs for huge pages; empty where they are on already, or cannot be had."""
    present = os.environ.get("GLIBC_TUNABLES", "")
    libc, version = platform.libc_ver()
    if TUNABLE in present or libc != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return {}
    try:
        setting = _PAGES.read_text()
    except OSError:
        return {}
    if "[madvise]" not in setting:  # always there anyway, or never
        return {}
    return {"GLIBC_TUNABLES": ":".join(filter(None, (present, f"{TUNABLE}=1")))}


def restart_with_huge_pages() -> None:
    """Become a new process with the same arguments and huge pages, if that makes a difference. Call it first.

    `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` in the environment keeps them off. A program that runs inside another one (a
    notebook, a debugger) stays where it is.
    """
    needed = environment()
    if not needed or _RESTARTED in os.environ or sys.argv[0] not in sys.orig_argv or sys.gettrace():
        return
    if sys.executable:
        with contextlib.suppress(OSError):  # it is faster with them, and works without
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **needed, _RESTARTED: "1"})
