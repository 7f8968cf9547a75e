"""Other starts of a run: from an interrupted run, from trained weights, on machines that differ."""

from __future__ import annotations

import json
import shutil

import pytest

import train
from convert import __main__ as convert
from jaxllm.config import DEFAULT_RECIPE, RunConfig, TrainConfig
from jaxllm.errors import UserError
from jaxllm.run import run as running
from jaxllm.run.arguments import INIT_LEARNING_RATE, parse_args
from jaxllm.run.metrics import RunLog
from jaxllm.store.folder import CONFIG_FILE
from jaxllm.store.metrics_file import read_metrics
from jaxllm.train.trainer import Trainer


def losses(folder):
    return {record["step"]: record["loss"] for record in read_metrics(folder) if "loss" in record}


def test_ctrl_c_ends_with_one_line_and_the_run_resumes(narrow, run, tmp_path, capsys, monkeypatch):
    write = RunLog.write

    def interrupting(log, record):
        write(log, record)
        if record["step"] == 12:
            raise KeyboardInterrupt

    args = [*narrow, "--run-dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", interrupting)
        assert train.main(args) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert train.main(args) == 0
    assert "Resuming from step 10" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(run)


def test_weights_without_tokenizer_need_one_and_take_its_special_tokens(narrow, run, tmp_path, capsys):
    exported, raw = tmp_path / "exported", tmp_path / "raw"
    assert convert.main(["to-torch", str(run), str(exported)]) == 0
    raw.mkdir()
    unset = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = json.loads((exported / "config.json").read_text())
    (raw / "config.json").write_text(json.dumps(config | unset))
    shutil.copy(exported / "model.safetensors", raw)
    assert convert.main(["to-flax", str(raw), str(tmp_path / "run")]) == 0
    args = [*narrow, "--run-dir", str(tmp_path / "run")]
    assert train.main(args) == 2
    assert "holds no tokenizer.json: train with --tokenizer FOLDER" in capsys.readouterr().err
    assert train.main([*args, "--tokenizer", str(run / "tokenizer")]) == 0
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["eos_token_id"] == 0


def options_of(*arguments, kind=TrainConfig):
    return parse_args(arguments, "test", None, kind).options()


def test_the_default_recipe_is_for_new_weights_and_trained_ones_have_a_low_rate(run, tmp_path):
    new, plain = options_of("--run-dir", str(tmp_path / "new")), TrainConfig().options()
    assert {name: new[name] for name in DEFAULT_RECIPE} == DEFAULT_RECIPE
    exported, converted = tmp_path / "exported", tmp_path / "converted"
    assert convert.main(["to-torch", str(run), str(exported)]) == 0
    assert convert.main(["to-flax", str(exported), str(converted)]) == 0
    wanted = {name: plain[name] for name in DEFAULT_RECIPE} | {"learning_rate": INIT_LEARNING_RATE}
    for start in (["--init", str(exported)], ["--run-dir", str(converted)]):
        options = options_of(*start)
        assert {name: options[name] for name in DEFAULT_RECIPE} == wanted, start
        assert options["model"]["hidden_size"] == 32


@pytest.mark.parametrize(
    ("bfloat16", "precision", "said"),
    [
        pytest.param(
            "the GPU",
            "bfloat16",
            "in bfloat16 (--precision float32 is slower: the GPU multiplies bfloat16 in hardware)",
            marks=pytest.mark.slow,
        ),
        (None, "float32", "in float32 (no known hardware support for bfloat16)"),
    ],
)
def test_a_new_run_decides_its_precision_by_the_devices_and_keeps_it(
    bfloat16, precision, said, narrow, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(running, "bfloat16_hardware", lambda: bfloat16)
    folder = tmp_path / "run"
    at = narrow.index("--precision")
    plain = [*narrow[:at], *narrow[at + 2 :], "--steps", "1", "--run-dir", str(folder)]
    args = [*plain, "--precision", "auto"]
    assert train.main(args) == 0
    assert said in capsys.readouterr().out
    assert json.loads((folder / CONFIG_FILE).read_text())["precision"] == precision
    monkeypatch.setattr(running, "bfloat16_hardware", lambda: "amx_bf16" if bfloat16 is None else None)  # moved
    for again in (args, plain):
        assert train.main(again) == 0
        assert f"tokens in {precision} (" in capsys.readouterr().out


def test_the_default_recipe_of_train_py_lets_the_devices_decide(tmp_path, run):
    folder = ("--run-dir", str(tmp_path / "new"))
    assert options_of(*folder)["precision"] == "auto"
    assert options_of(*folder, "--precision", "float32")["precision"] == "float32"
    for unchanged in (options_of(*folder, "--recipe", "seed"), options_of(*folder, kind=RunConfig)):
        assert unchanged["precision"] == "float32"
    assert options_of("--run-dir", str(run))["precision"] == "float32"  # what the run has


def test_auto_is_no_precision_to_compute_in():
    with pytest.raises(UserError, match="precision is 'auto'"):
        Trainer(TrainConfig(precision="auto"))
