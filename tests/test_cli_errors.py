"""Bad input: one line that names the field and the value, exit code 2, and nothing made or destroyed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import train
from convert import __main__ as convert
from jaxllm import generate as generation
from jaxllm.command_line import parse
from jaxllm.config import PRESETS, TrainConfig
from jaxllm.data import hub_source
from jaxllm.data import tokenizer as tokenizers
from jaxllm.errors import UserError
from jaxllm.plan import __main__ as plan
from jaxllm.run import replay
from jaxllm.run.arguments import parse_args

ROOT = Path(__file__).parents[1]


def refused(main, arguments: list[str], capsys, *parts: str) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    for part in parts:
        assert part in error, error


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--preset", "huge"], ["preset is 'huge'", "customllm-1b"]),
        (["--recipe", "secret"], ["recipe is 'secret'"]),
        (["--model.hidden-size", "100"], ["hidden_size is 100", "num_attention_heads"]),
        (["--seq-len", "4096"], ["seq_len is 4096", "max_position_embeddings"]),
        (["--model.num-experts-per-tok", "8"], ["num_experts_per_tok is 8", "n_routed_experts = 7"]),
        (["--steps", "0"], ["steps is 0"]),
        (["--peak-tflops", "0"], ["peak_tflops is 0", "larger than 0"]),
        (["--data", "no/such/file.txt"], ["data is 'no/such/file.txt'"]),
        (["--data", "nothing.parquet"], ["data is 'nothing.parquet'"]),
        (["--tokenizer", "./nowhere"], ["tokenizer is './nowhere'"]),
        (["--model.vocab-size", "100"], ["vocab_size is 100"]),
    ],
)
def test_bad_options(options, parts, corpus, tmp_path, capsys):
    data = [] if "--data" in options else ["--data", str(corpus)]
    refused(train.main, [*options, *data, "--run-dir", str(tmp_path / "run")], capsys, *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("empty.txt", b"", "it is empty"),
        ("image.png", b"\x89PNG", "the ending is none of"),
        ("rows.jsonl", b'{"body": "x"}\n', "--text-field"),
        ("rows.parquet", b"no parquet", "not a parquet file"),
        ("short.txt", b"just a few words", "two rows or files"),
    ],
)
def test_bad_data_files(name, content, part, tmp_path, capsys):
    file = tmp_path / name
    file.write_bytes(content)
    refused(train.main, ["--data", str(file), "--run-dir", str(tmp_path / "run")], capsys, part)
    assert not (tmp_path / "run").exists()


def test_without_a_network_the_error_names_the_hub_and_the_alternatives(tmp_path, capsys, monkeypatch):
    for module in (hub_source, tokenizers):
        monkeypatch.setattr(module, "hub_reachable", lambda: False)
    arguments = ["--preset", "customllm-1b", "--recipe", "seed", "--run-dir", str(tmp_path / "run")]
    refused(train.main, arguments, capsys, "HuggingFaceTB/smollm-corpus", "could not be reached", "--data FILE")
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_does_not_fit(run, corpus, tmp_path, capsys):
    arguments = ["--model.vocab-size", "200", "--tokenizer", str(run / "tokenizer"), "--data", str(corpus)]
    refused(train.main, [*arguments, "--run-dir", str(tmp_path / "run")], capsys, "vocab_size is 200", "300 tokens")


def test_options_of_the_wrong_type_end_with_the_same_code():
    with pytest.raises(SystemExit) as end:
        train.main(["--batch-size", "many"])
    assert end.value.code == 2


def test_generate_and_convert_refuse_a_folder_that_is_not_a_run(run, tmp_path, capsys):
    refused(generation.main, [str(tmp_path)], capsys, "it has no config.json")
    refused(convert.main, ["to-torch", str(tmp_path), str(tmp_path / "out")], capsys, "it has no config.json")
    refused(convert.main, ["to-flax", str(tmp_path / "x.bin"), str(tmp_path / "out")], capsys)
    refused(generation.main, [str(run), "--max-new-tokens", "500"], capsys, "max_new_tokens is 500", "embeddings is 64")
    refused(generation.main, [str(run), "--top-p", "1.5"], capsys, "top_p is 1.5")
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_in_any_path_option_is_the_home_folder(tmp_path, monkeypatch):
    """The shell leaves it in `--run-dir=~/run`. Each path of each command is given as `~/NAME`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = 0
    for kind in (
        TrainConfig,
        generation.GenerateArgs,
        replay.ReplayArgs,
        plan.PlanArgs,
        convert.ToTorch,
        convert.ToFlax,
    ):
        hints = {name: hint for name, hint in get_type_hints(kind, include_extras=True).items() if "Path" in str(hint)}
        flags = [name for name, hint in hints.items() if "Positional" not in str(hint)]
        arguments = [f"--{name.replace('_', '-')}=~/{name}" for name in flags]
        arguments += [f"~/{name}" for name in hints if name not in flags]
        more = {replay.ReplayArgs: ["1"], TrainConfig: ["--lora-rank", "1"]}.get(kind, [])  # --adapter needs a rank
        parsed = parse(kind, [*arguments, *more], "test")
        assert {name: str(getattr(parsed, name)) for name in hints} == {name: f"{tmp_path}/{name}" for name in hints}
        seen += len(hints)
    assert seen >= 8


def test_every_command_line_is_read_in_one_place():
    sources = [file for room in ("jaxllm", "convert", "torch_ref") for file in (ROOT / room).rglob("*.py")]
    assert [file.name for file in sources if "tyro.cli(" in file.read_text()] == ["command_line.py"]


@pytest.mark.parametrize("platform", ["cuda", pytest.param("tpu", marks=pytest.mark.slow), "nonsense"])
def test_a_device_that_is_not_here_is_named_in_a_line(platform, run, tmp_path):
    program = (
        "import sys, train; from convert import __main__ as convert; from jaxllm import generate\n"
        "from jaxllm.run import replay\n"
        f"generate.main([{str(run)!r}]); replay.main([{str(run)!r}, '12'])\n"
        f"convert.main(['to-torch', {str(run)!r}, {str(tmp_path / 'out')!r}])\n"
        f"sys.exit(train.main(['--run-dir', {str(tmp_path / 'run')!r}]))"
    )
    command = [sys.executable, "-c", program]
    environment = os.environ | {"JAX_PLATFORMS": platform}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    errors = done.stderr.splitlines()
    assert len(errors) == 4, done.stderr
    assert all(line.startswith(f"error: JAX_PLATFORMS is '{platform}': ") for line in errors)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("main", [train.main, generation.main, plan.main, replay.main])
def test_the_help_explains_every_option_and_names_the_presets(main, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")  # one column
    with pytest.raises(SystemExit):
        main(["--help-all" if main is train.main else "--help"])
    said = capsys.readouterr().out
    if main in (train.main, plan.main):
        assert f"one of {', '.join(PRESETS)}." in " ".join(said.replace("│", " ").split())
    examples = [line.strip() for line in said.splitlines() if "python " in line and not line.startswith(("usage", "│"))]
    assert examples
    assert all(line.startswith("python ") and line.count("python ") == 1 for line in examples)
    options = re.split(r"(?m)^[│ ] (?=--[a-z])", said)[1:]  # in a frame, or without one
    assert len(options) > 3 or main is replay.main
    for option in options:
        words = re.sub(r"(?m)^([│─╭╮╰╯].*?| [a-z. -]+) options.*", "", option).replace("│", " ")
        explanation = words.partition("(default")[0].split(maxsplit=1)[-1]
        if not option.startswith("--model."):  # their names are transformers'
            assert re.search(r"[a-z]{2,}[a-z :;,`.()-]* [a-z]+", explanation), option


def test_several_sources_without_weights_are_refused():
    with pytest.raises(UserError, match=r"--data is given twice: .*several sources need weights: --data A=0.7,B=0.3"):
        parse_args(["--data", "a", "--data=b"], "train", None, TrainConfig)
