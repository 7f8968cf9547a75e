"""train.py from the outside: what it leaves, what it prints, how it resumes, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import time

import pytest

import train
from jaxllm.config import ModelConfig, TrainConfig
from jaxllm.data.stream import TokenStream
from jaxllm.files import read_json
from jaxllm.model import flops
from jaxllm.run.reporting import announce
from jaxllm.store.metrics_file import read_metrics
from tests.fingerprint import without_times


def lines(folder, key: str) -> list[dict]:
    return [record for record in read_metrics(folder) if key in record]


def test_the_folder_holds_everything(run):
    for name in ("config.json", "train_config.json", "metrics.jsonl", "loss.png", "samples.md", "tokenizer"):
        assert (run / name).exists(), name
    report, end = (run / "report.md").read_text(), lines(run, "train_runtime")[0]
    last = lines(run, "eval_loss")[-1]["eval_loss"]
    for part in (f"{end['parameters']:,}", f"{last:.4f}", "20 steps of 64", f"train.py --run-dir {run} --steps 40"):
        assert part in report
    assert list((run / "tensorboard").glob("events*"))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["10", "20"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "samples.md").read_text().count("## ") == 5


def test_the_log_has_the_source_s_lines(run):
    train_line, eval_line, end = lines(run, "loss")[0], lines(run, "eval_loss")[0], lines(run, "train_runtime")[0]
    speed = ["tflops_per_second", "mfu_full", "mfu_causal", "data_wait"]
    assert list(train_line) == [
        "loss", "grad_norm", "learning_rate", "epoch", "step", "tokens_per_second", "expert_load",
        *speed, "host_peak_gib",
    ]  # fmt: skip
    assert list(eval_line) == [
        "eval_loss", "eval_bits_per_byte", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second",
        "epoch", "step",
    ]  # fmt: skip
    assert list(end) == [
        "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_tokens_per_second", "train_loss",
        "epoch", "step", "nonfinite_steps", *(f"train_{name}" for name in speed), "host_peak_gib", "peak_tflops",
        "parameters", "active_parameters", "compile_seconds",
    ]  # fmt: skip
    assert [record["step"] for record in lines(run, "loss")] == list(range(1, 21))
    assert [record["step"] for record in lines(run, "eval_loss")] == [10, 20]


def test_the_speed_columns_agree_with_each_other(run):
    config = ModelConfig.from_dict(read_json(run / "config.json"))
    end = lines(run, "train_runtime")[0]
    assert end["parameters"] == sum(flops.parameters(config).values())
    assert end["active_parameters"] == sum(flops.active_parameters(config).values()) < end["parameters"]
    assert end["peak_tflops"] > 0
    assert end["compile_seconds"] > 0
    assert end["host_peak_gib"] > 0.05
    for record in [*lines(run, "loss"), {key.removeprefix("train_"): value for key, value in end.items()}]:
        assert 0 < record["mfu_causal"] < record["mfu_full"] <= 1.2
        assert 0 <= record["data_wait"] <= 1
        tflops = record["tokens_per_second"] * flops.training_flops_per_token(config, 16, "full") / 1e12
        assert record["tflops_per_second"] == pytest.approx(tflops, rel=1e-3)
        assert record["mfu_full"] == pytest.approx(tflops / end["peak_tflops"], rel=2e-3)


@pytest.mark.slow
def test_a_given_peak_is_what_the_mfu_is_a_share_of(narrow, tmp_path, capsys):
    arguments = ["--peak-tflops", "0.25", "--steps", "2", "--sample-tokens", "0", "--run-dir", str(tmp_path / "run")]
    assert train.main([*narrow, *arguments]) == 0
    assert "0.25 TFLOP/s (given for float32 matrix products)" in capsys.readouterr().out
    line = lines(tmp_path / "run", "loss")[0]
    assert line["mfu_full"] == pytest.approx(line["tflops_per_second"] / 0.25, rel=2e-3)
    assert lines(tmp_path / "run", "train_runtime")[0]["peak_tflops"] == 0.25


def test_a_slow_source_shows_as_waiting(narrow, tmp_path, monkeypatch):
    next_rows = TokenStream.next_rows

    def slow(stream, count):
        time.sleep(0.3)
        return next_rows(stream, count)

    monkeypatch.setattr(TokenStream, "next_rows", slow)
    arguments = ["--steps", "10", "--eval-every", "10", "--sample-tokens", "0", "--run-dir", str(tmp_path / "run")]
    assert train.main([*narrow, *arguments]) == 0
    assert lines(tmp_path / "run", "loss")[-1]["data_wait"] > 0.5  # behind the batches that were there before
    assert lines(tmp_path / "run", "train_runtime")[0]["train_data_wait"] > 0.1


def test_it_learns_far_below_a_unigram_model_and_repeats_itself(narrow, tmp_path, capsys):
    arguments = [*narrow, "--steps", "60", "--learning-rate", "1e-2", "--log-every", "5", "--eval-every", "60"]
    arguments += ["--sample-tokens", "0"]
    losses = []
    for name in ("one", "two"):
        assert train.main([*arguments, "--save-every", "60", "--run-dir", str(tmp_path / name)]) == 0
        losses.append(without_times(read_metrics(tmp_path / name)))
    assert losses[0] == losses[1]
    out = capsys.readouterr().out
    assert "Model parameters: 0.05M" in out
    assert "(0-1): 2 x DecoderLayer(" in out
    verdict = next(line for line in out.splitlines() if line.startswith("Evaluation loss"))
    assert verdict.endswith("(on 7 rows)")
    evaluation, bits, unigram, unigram_bits = map(float, re.findall(r"[0-9]+[.][0-9]+", verdict))
    assert bits / evaluation == pytest.approx(unigram_bits / unigram, rel=1e-3)
    assert evaluation < unigram - 1


def test_a_resumed_run_equals_the_uninterrupted_one(run, narrow, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "20")
    assert train.main([*narrow, "--run-dir", str(folder)]) == 0
    assert "Resuming from step 10" in capsys.readouterr().out
    assert without_times(lines(folder, "loss")) == without_times(lines(run, "loss"))
    assert lines(folder, "eval_loss")[-1]["eval_loss"] == lines(run, "eval_loss")[-1]["eval_loss"]


def test_a_finished_run_reports_it_and_more_steps_continue(run, narrow, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    assert train.main([*narrow, "--run-dir", str(folder)]) == 0
    assert "pass --steps MORE" in capsys.readouterr().out
    assert train.main([*narrow, "--run-dir", str(folder), "--steps", "21"]) == 0
    assert [record["step"] for record in lines(folder, "loss")] == list(range(1, 22))


@pytest.mark.parametrize(("warmup", "said"), [(20, True), (19, False)])
def test_a_warm_up_that_is_not_shorter_than_the_run_is_said(warmup, said, tmp_path, capsys):
    config = TrainConfig.from_options(run_dir=tmp_path, steps=20, warmup_steps=warmup)
    announce(config, parameters=1, tree=None, device="cpu", bfloat16=None)  # as each start does
    assert (f"The warm-up of {warmup} steps is not shorter than the run of 20" in capsys.readouterr().out) == said


def test_overwrite_starts_over(run, narrow, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    assert train.main([*narrow, "--run-dir", str(folder), "--steps", "2", "--overwrite"]) == 0
    assert [record["step"] for record in lines(folder, "loss")] == [1, 2]


@pytest.mark.parametrize(
    "change",
    [
        ("--learning-rate", "0.5", "learning_rate is 0.5"),
        ("--seed", "7", "seed is 7"),
        ("--model.moe-intermediate-size", "32", "model.moe_intermediate_size is 32"),
    ],
)
def test_a_resume_that_would_change_the_numbers_is_refused(run, narrow, change, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    option, value, message = change
    assert train.main([*narrow, option, value, "--run-dir", str(run)]) == 2
    assert message in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


def test_all_options_that_forbid_a_resume_are_named_at_once(run, narrow, capsys):
    assert train.main([*narrow, "--seed", "7", "--beta1", "0.5", "--steps", "30", "--run-dir", str(run)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "beta1 is 0.5, and the run has 0.9; seed is 7, and the run has 0" in error
    assert "steps" not in error  # this one may change
    assert "--overwrite" not in error  # nothing is wrong with the run


@pytest.mark.parametrize(
    "change",
    [
        ("text_field", "--text-field", "body"),  # each of these is refused on its own, in another place
        ("tokenizer", "--tokenizer", "./nowhere"),
    ],
)
def test_a_changed_option_that_is_also_wrong_is_named_with_the_others(change, run, narrow, capsys):
    name, *options = change
    assert train.main([*narrow, "--seed", "7", *options, "--run-dir", str(run)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{name} is " in error
    assert "seed is 7, and the run has 0" in error


def test_a_bare_resume_takes_its_options_from_the_run(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    before = read_json(folder / "train_config.json")
    assert train.main(["--run-dir", str(folder), "--steps", "21"]) == 0
    assert "Resuming from step 20" in capsys.readouterr().out
    after = read_json(folder / "train_config.json")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"steps"}


@pytest.mark.slow
def test_options_of_one_start_are_not_kept(narrow, tmp_path):
    folder = tmp_path / "run"
    arguments = [*narrow, "--steps", "20", "--sample-tokens", "0", "--run-dir", str(folder)]
    assert train.main([*arguments, "--overwrite", "--strict"]) == 0
    assert not read_json(folder / "train_config.json").keys() & {
        "overwrite",
        "strict",
        "coordinator",
        "process_id",
        "run_dir",
    }
    assert train.main(["--run-dir", str(folder), "--steps", "21"]) == 0  # it does not start over
    assert [record["step"] for record in lines(folder, "loss")] == list(range(1, 22))


def test_a_run_of_an_earlier_format_is_refused_by_its_number(run, narrow, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    values = read_json(folder / "train_config.json")
    del values["format"]
    (folder / "train_config.json").write_text(json.dumps(values))
    assert train.main([*narrow, "--run-dir", str(folder)]) == 2
    assert "has format 1, and this version resumes format 2 (see CHANGELOG.md)" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_left_alone(narrow, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert train.main([*narrow, "--run-dir", str(tmp_path), "--overwrite"]) == 2
    assert "the folder holds something else" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_another_project_s_trainer_folder_is_left_alone(narrow, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "checkpoint-5").mkdir()
    for options in ((), ("--overwrite",)):
        assert train.main([*narrow, "--run-dir", str(tmp_path), *options]) == 2
        assert "the folder holds something else" in capsys.readouterr().err
    assert (tmp_path / "checkpoint-5").is_dir()


@pytest.mark.slow
def test_accumulation_bfloat16_and_remat_run(narrow, tmp_path):
    options = ["--grad-accum", "2", "--batch-size", "2", "--precision", "bfloat16", "--remat", "--steps", "2"]
    assert train.main([*narrow, *options, "--run-dir", str(tmp_path / "run")]) == 0
    saved = json.loads((tmp_path / "run" / "train_config.json").read_text())
    assert (saved["grad_accum"], saved["precision"], saved["remat"]) == (2, "bfloat16", True)
    assert len(lines(tmp_path / "run", "loss")) == 2
