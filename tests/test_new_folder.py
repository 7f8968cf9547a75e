"""The folder that a conversion writes: whole, or not there, also when the conversion is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from convert import write_files
from convert.__main__ import main
from convert.new_folder import new_folder
from convert.to_torch import save_pretrained
from jaxllm import UserError
from jaxllm import generate as generation

KILLED = """
import os, sys
from convert import __main__, new_folder
new_folder.rename_durably = lambda *_: os._exit(137)
__main__.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    assert main(["to-torch", str(run), str(out)]) == 0
    return out


def content(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["to-flax", pytest.param("to-torch", marks=pytest.mark.slow)])
def test_a_killed_conversion_leaves_no_folder_and_the_same_command_writes_it(kind, run, exported, tmp_path):
    out = tmp_path / "odd [name]" / "out"
    command = [kind, str({"to-flax": exported, "to-torch": run}[kind]), str(out)]
    assert subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True).returncode == 137
    (scratch,) = out.parent.iterdir()
    assert scratch.name.startswith(".out.")
    assert main(command) == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / {"to-flax": "source_dtypes.json", "to-torch": "README.md"}[kind]).is_file()


def test_an_error_leaves_nothing_and_an_empty_folder_may_be_there(tmp_path):
    (tmp_path / "out").mkdir()

    def fail() -> None:
        with new_folder(tmp_path / "out") as made:
            (made / "file").write_text("a part")
            raise UserError("in the middle")

    with pytest.raises(UserError, match="in the middle"):
        fail()
    assert content(tmp_path) == ["out"]
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with new_folder(tmp_path / "link") as made:
        (made / "file").write_text("whole")
    assert content(tmp_path) == ["link", "out", "out/file"]


def test_only_what_a_killed_process_left_of_the_same_folder_is_deleted(tmp_path):
    kept = [".other.abcdefgh/other", ".out.abcdefgh/notes", ".out.abc/out", ".out.more.abcdefgh/out.more"]
    for folder in (*kept, ".out.left_123/out"):
        (tmp_path / folder).mkdir(parents=True)
    with new_folder(tmp_path / "out"):
        with pytest.raises(UserError, match="another process writes it"), new_folder(tmp_path / "out"):
            pass
        assert not (tmp_path / ".out.left_123").exists()
    assert (tmp_path / "out").is_dir()
    assert all((tmp_path / folder).is_dir() for folder in kept)


def test_the_current_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"\. is the current folder or a mount point: pass a new folder in it"):
        new_folder(".").__enter__()


@pytest.mark.slow
def test_a_refused_sharded_export_leaves_no_shards(run, tmp_path, monkeypatch):
    monkeypatch.setattr(write_files, "MAX_SHARD_BYTES", 50_000)
    checked = write_files._checked

    def refuse_the_last(tensor):
        if tensor.name == "lm_head.bias":
            raise UserError("not a number")
        return checked(tensor)

    monkeypatch.setattr(write_files, "_checked", refuse_the_last)
    with pytest.raises(UserError, match="not a number"):
        save_pretrained(generation.load_model(run), tmp_path / "out")
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_a_conversion_that_an_earlier_version_did_not_finish_is_not_trained(run, narrow, tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "source").mkdir()
    (folder / "config.json").write_bytes((run / "config.json").read_bytes())
    assert train.main([*narrow, "--run-dir", str(folder)]) == 2
    assert "`convert to-flax` was stopped there before it wrote the weights" in capsys.readouterr().err
    assert content(folder) == ["checkpoints", "config.json", "source"]
