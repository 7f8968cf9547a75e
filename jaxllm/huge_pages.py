"""Huge pages for everything that is allocated: on a CPU, a tenth of a training step's time.

A step allocates gigabytes anew, and Linux fills them in page by page, 4 KiB each, unless a program asks for pages of
2 MiB. glibc's malloc asks if it is told to (glibc 2.35, tunable `glibc.malloc.hugetlb`), but reads that only when a
process starts.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment() -> dict[str, str]:
    """The variables that a new process needs for huge pages; empty where they are on already, or cannot be had."""
    present = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in present or platform.libc_ver()[0] != "glibc" or not _PAGES.is_file():
        return {}
    if "[madvise]" not in _PAGES.read_text():  # always there anyway, or never
        return {}
    return {"GLIBC_TUNABLES": ":".join(filter(None, (present, f"{TUNABLE}=1")))}


def restart_with_huge_pages() -> None:
    """Become a new process with the same arguments and huge pages, if that makes a difference. Call it first.

    `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` in the environment keeps them off.
    """
    needed = environment()
    if needed:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **needed})
