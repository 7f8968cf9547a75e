"""Other starts of a run: from an interrupted run, and from weights that came without a tokenizer."""

from __future__ import annotations

import json
import shutil

import train
from convert import __main__ as convert
from jaxllm.run.metrics import RunLog, read_metrics


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


def test_weights_without_tokenizer_and_special_tokens_get_those_of_the_data(narrow, run, tmp_path):
    exported, raw = tmp_path / "exported", tmp_path / "raw"
    assert convert.main(["to-torch", str(run), str(exported)]) == 0
    raw.mkdir()
    unset = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = json.loads((exported / "config.json").read_text())
    (raw / "config.json").write_text(json.dumps(config | unset))
    shutil.copy(exported / "model.safetensors", raw)
    assert convert.main(["to-flax", str(raw), str(tmp_path / "run")]) == 0
    assert train.main([*narrow, "--run-dir", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["eos_token_id"] == 0
