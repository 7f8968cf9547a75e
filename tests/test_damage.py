"""CheckpointWriter that are no longer what was written: found by checksum, named in a line, never read as good."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import train
from convert import __main__ as convert
from jaxllm import generate as generation
from jaxllm.errors import UserError
from jaxllm.run import checkpoint
from jaxllm.run.checkpoint import CheckpointReader, choose_checkpoint, load_weights
from jaxllm.run.checkpoint_writer import _ChecksummedFolder
from jaxllm.run.checksums import CHECKSUMS_FILE, find_damage
from jaxllm.run.metrics import read_metrics
from tests.fingerprint import fingerprint


def flip_bit(file: Path) -> None:
    """One bit in the middle: of a file of arrays, in their data."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "deleted": Path.unlink,
    "emptied": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "a bit flipped": flip_bit,
    "grown": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
}


@pytest.fixture
def damaged(run, tmp_path) -> Path:
    """A copy of the run, to damage."""
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_any_file_of_a_checkpoint_is_found_and_named(kind, damaged, capsys):
    """Each file in turn; the checkpoint before it is used, and with `strict` none is."""
    newest = damaged / "checkpoints" / "20"
    files = sorted(file for file in newest.rglob("*") if file.is_file())
    assert len(files) > 25
    # arrays are among them: most bytes of the weights and of two moments, which are compressed
    (end,) = (record for record in read_metrics(damaged) if "train_runtime" in record)
    assert sum(file.stat().st_size for file in files) > 2.5 * 4 * end["parameters"] > 450_000
    assert choose_checkpoint(damaged) == (20, [])
    for file in files:
        whole = file.read_bytes()
        DAMAGE[kind](file)
        assert choose_checkpoint(damaged) == (10, [20]), file
        (line,) = capsys.readouterr().err.splitlines()
        named = CHECKSUMS_FILE if file.name == CHECKSUMS_FILE else file.relative_to(newest).as_posix()
        assert f"{newest} is damaged ({named}" in line
        with pytest.raises(UserError, match="leave out --strict"):
            choose_checkpoint(damaged, strict=True)
        file.write_bytes(whole)
    assert find_damage(newest) is None


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(damaged, run, narrow, capsys):
    """The damaged one is moved away, and the run ends as if it were intact; with `strict`, nothing is changed."""
    array = max((damaged / "checkpoints" / "20" / "weights").rglob("*"), key=lambda path: path.stat().st_size)
    flip_bit(array)
    before = sorted(damaged.rglob("*"))
    assert train.main([*narrow, "--run-dir", str(damaged), "--strict"]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert sorted(damaged.rglob("*")) == before
    assert train.main([*narrow, "--run-dir", str(damaged)]) == 0
    said = capsys.readouterr()
    assert f"checkpoints/20 is damaged ({array.relative_to(damaged / 'checkpoints' / '20')}" in said.err
    assert "Resuming from step 10" in said.out
    assert (damaged / "damaged" / "20" / CHECKSUMS_FILE).is_file()
    assert fingerprint(damaged) == fingerprint(run)


def test_readers_of_a_run_use_the_checkpoint_before_a_damaged_one(damaged, run, capsys):
    flip_bit(damaged / "checkpoints" / "20" / CHECKSUMS_FILE)
    assert generation.main([str(damaged), "--prompt", "def", "--max-new-tokens", "2"]) == 0
    assert "checkpoints/20 is damaged" in capsys.readouterr().err
    shutil.rmtree(damaged / "checkpoints" / "20")
    older = load_weights(damaged)[1]
    assert not np.array_equal(older.params["lm_head"]["weight"], load_weights(run)[1].params["lm_head"]["weight"])


def test_nothing_is_read_if_all_are_damaged(damaged, narrow, capsys):
    for step in (10, 20):
        (damaged / "checkpoints" / str(step) / "weights" / "manifest.ocdbt").unlink()
    assert train.main([*narrow, "--run-dir", str(damaged)]) == 2
    assert "holds no checkpoint that is not damaged" in capsys.readouterr().err
    assert (damaged / "checkpoints" / "20").is_dir()


def test_another_tokenizer_or_model_config_than_the_checkpoint_s_is_refused(damaged, narrow, capsys):
    tokenizer, config = damaged / "tokenizer" / "tokenizer.json", damaged / "config.json"
    whole = tokenizer.read_text()
    tokenizer.write_text(whole.replace(" ", "  ", 1))
    for main, arguments in ((train.main, [*narrow, "--run-dir", str(damaged)]), (generation.main, [str(damaged)])):
        assert main(arguments) == 2
        assert "tokenizer.json is not the file that" in capsys.readouterr().err
    tokenizer.write_text(whole)
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"rope_theta": 10001.0}))
    assert generation.main([str(damaged)]) == 2
    assert "config.json is not the config that" in capsys.readouterr().err


def test_a_lost_metrics_file_is_restored_from_the_checkpoint(damaged, narrow, run):
    (damaged / "metrics.jsonl").unlink()
    shutil.rmtree(damaged / "checkpoints" / "20")
    assert train.main([*narrow, "--run-dir", str(damaged)]) == 0
    assert fingerprint(damaged) == fingerprint(run)
    old = (run / "metrics.jsonl").read_text().splitlines()
    assert (damaged / "metrics.jsonl").read_text().splitlines()[:10] == old[:10]  # with all that was measured


@pytest.mark.parametrize("name", ["../../config.json", "/etc/hostname", "weights/../../../metrics.jsonl"])
def test_a_list_that_names_other_files_opens_none(name, damaged, tmp_path):
    newest = damaged / "checkpoints" / "20"
    listed = json.loads((newest / CHECKSUMS_FILE).read_text())["list"]
    listed["files"][name] = {"bytes": 1, "sha256": ""}
    own = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    (newest / CHECKSUMS_FILE).write_text(json.dumps({"sha256": own, "list": listed}))
    assert find_damage(newest) == f"{name} is missing"


@pytest.mark.parametrize("values", [{"model": "x"}, {"tokenizer": 5}, {"files": [1]}, {"files": {"a\nerror: b": {}}}])
def test_a_malformed_list_is_reported_as_damage_in_one_line(values, damaged, capsys):
    newest = damaged / "checkpoints" / "20"
    whole = json.loads((newest / CHECKSUMS_FILE).read_text())["list"] | values
    own = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    (newest / CHECKSUMS_FILE).write_text(json.dumps({"sha256": own, "list": whole}))
    assert choose_checkpoint(damaged) == (10, [20])
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("command", ["generate", "to-torch", "to-torch --training"])
@pytest.mark.parametrize("moment", ["checksums", "restore"])
def test_a_checkpoint_that_the_trainer_removes_while_it_is_read_is_looked_for_again(
    command, moment, run, tmp_path, capsys, monkeypatch
):
    """As with --keep-checkpoints 1: another one is there before the one that is being read goes."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / "checkpoints" / "20").rename(tmp_path / "20")
    where, name = (checkpoint, "find_damage") if moment == "checksums" else (CheckpointReader, "_restore")
    original = getattr(where, name)

    def removing(*args, **kwargs):
        if (tmp_path / "20").exists():
            (tmp_path / "20").rename(folder / "checkpoints" / "20")
            shutil.rmtree(folder / "checkpoints" / "10" / "weights")
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, removing)
    if command == "generate":
        assert generation.main([str(folder), "--max-new-tokens", "2"]) == 0
    else:
        name, *options = command.split()
        assert convert.main([name, str(folder), str(tmp_path / "out"), *options]) == 0
    assert capsys.readouterr().err == ""
    if "--training" in command:
        assert (tmp_path / "out" / "checkpoint-20").is_dir()


def test_checkpoints_that_are_removed_faster_than_they_are_read_end_in_a_line(run, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(run, tmp_path / "run"))

    def removing(reader, **targets):
        newest = folder / "checkpoints" / str(reader.step)
        newest.rename(newest.with_name(str(reader.step + 1)))
        raise UserError("cannot be read")

    monkeypatch.setattr(CheckpointReader, "_restore", removing)
    with pytest.raises(UserError, match="larger --keep-checkpoints"):
        load_weights(folder)


def test_a_description_that_orbax_writes_late_is_in_the_checksums(run, tmp_path):
    """It is written in a thread that orbax does not wait for: the checkpoint would be taken for a damaged one."""
    made, final = tmp_path / "checkpoints" / "5.tmp", tmp_path / "checkpoints" / "5"
    shutil.copytree(run / "checkpoints" / "20", made)
    description = made / "_CHECKPOINT_METADATA"
    whole = description.read_text()
    description.write_text('{"item_handlers": null, "init_timestamp_nsecs": 1}')
    late = threading.Timer(0.3, description.write_text, (whole,))
    late.start()
    places = SimpleNamespace(get=lambda: made, get_final=lambda: final)
    asyncio.run(_ChecksummedFolder.finalize(places))  # pyright: ignore[reportArgumentType]
    late.join()
    assert find_damage(final) is None
