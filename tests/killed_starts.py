"""Kill the start of a run at each operation on its folder, then start it again: `test_killed_starts.py` runs it.

python -m tests.killed_starts FRAMEWORK FOLDER BEFORE OPTION...

`BEFORE` is what the folder holds before the run starts. Imports neither JAX nor PyTorch, so that it can fork.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from jaxllm.config import RunConfig, TrainConfig
from jaxllm.run.lock import LOCK_FILE, FolderLock
from jaxllm.run.prepare import parse_args, prepare

transformers.PreTrainedTokenizerFast  # noqa: B018  imported once, before the forks

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
KILLED = 137


def start(framework: Any, arguments: Sequence[str]) -> None:
    config = parse_args(arguments, "train", None, TrainConfig if framework == "JAX" else RunConfig)
    with FolderLock(config.folder) as lock:
        prepare(config, framework, lock)


def killed_at(number: int, folder: Path) -> None:
    """End this process, as SIGKILL does, before its operation of this number on something in the folder."""
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event not in CHANGES or not str(args[0]).startswith(str(folder)) or LOCK_FILE in str(args[0]):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        count += 1
        if count == number:
            os._exit(KILLED)

    sys.addaudithook(hook)


def in_a_fork(framework: str, arguments: Sequence[str], folder: Path, number: int | None) -> int:
    child = os.fork()
    if not child:
        if number is not None:
            killed_at(number, folder)
        try:
            start(framework, arguments)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if not path.is_dir() and LOCK_FILE not in path.name)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def main() -> int:
    framework, folder, before, *arguments = sys.argv[1:]
    run, arguments = Path(folder).resolve(), [*arguments, "--run-dir", folder]

    def again() -> None:
        shutil.rmtree(run, ignore_errors=True)
        if before:
            shutil.copytree(before, run)

    again()
    assert in_a_fork(framework, arguments, run, None) == 0
    wanted, number = content(run), 0
    while True:
        number += 1
        again()
        if (code := in_a_fork(framework, arguments, run, number)) == 0:
            break
        assert code == KILLED, code
        left = sorted(content(run))
        assert in_a_fork(framework, arguments, run, None) == 0, f"killed at {number}, which left {left}"
        found = content(run)
        assert found == wanted, f"killed at {number}, which left {left}: {sorted(found.keys() ^ wanted.keys())}"
        folders = {path.name for path in run.rglob("*/")}
        assert not [name for name in folders if name.startswith(".")], folders
    print(number - 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
