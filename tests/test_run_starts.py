"""Other starts of a run: from an interrupted run, from trained weights, on machines that differ."""

from __future__ import annotations

import json
import shutil

import pytest

import train
from convert import __main__ as convert
from jaxllm.config import DEFAULT_RECIPE, RunConfig, TrainConfig
from jaxllm.run import arguments
from jaxllm.run.arguments import INIT_LEARNING_RATE, parse_args
from jaxllm.run.hardware import bfloat16_hardware
from jaxllm.run.metrics import RunLog
from jaxllm.store.metrics_file import read_metrics


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
    ("flags", "wanted"),
    [
        ("flags\t\t: fpu avx512_bf16 sse\n", "avx512_bf16"),
        ("processor : 0\nflags : fpu avx512_bf16 amx_bf16\n", "amx_bf16"),
        ("flags : fpu avx512f\n", None),
        ("Features : bf16\n", None),
        ("", None),
        (None, None),  # no such file
    ],
)
def test_a_new_run_is_in_bfloat16_where_the_processor_multiplies_it(flags, wanted, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    if flags is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc" / "cpuinfo").write_text(flags)
    assert bfloat16_hardware(tmp_path) == wanted
    monkeypatch.setattr(arguments, "bfloat16_hardware", lambda: wanted)
    folder = ("--run-dir", str(tmp_path / "run"))
    assert options_of(*folder)["precision"] == ("bfloat16" if wanted else "float32")
    assert options_of(*folder, "--precision", "float32")["precision"] == "float32"
    for unchanged in (options_of(*folder, "--recipe", "seed"), options_of(*folder, kind=RunConfig)):
        assert unchanged["precision"] == "float32"


def test_a_run_keeps_its_precision_on_another_machine(run, monkeypatch):
    monkeypatch.setattr(arguments, "bfloat16_hardware", lambda: "avx512_bf16")
    assert options_of("--run-dir", str(run))["precision"] == "float32"
