"""python -m benchmarks.learning: what counts as Python, and one line for each run."""

from __future__ import annotations

import pytest

from benchmarks.learning import main, parses
from jaxllm.run.metrics import last_evaluation


@pytest.mark.parametrize(
    ("sample", "wanted"),
    [
        ("x = 1\nif x", True),  # the last line is cut off
        ("def f():\n    return 1\n\ncla", True),
        ("def f(:\n    return 1\n", False),
        ("x = 1", False),  # no line is complete
        ("\n\n", False),
        ("x = '\\d'\n", True),  # a warning, which is none here
        ("a\0b\n", False),
    ],
)
def test_completed_lines_are_parsed(sample, wanted):
    assert parses(sample) is wanted


def test_a_run_has_its_evaluation_and_a_share(run, tmp_path, capsys):
    assert not main([str(run), "--samples", "2", "--tokens", "8"])
    out, last = capsys.readouterr().out, last_evaluation(run)
    for part in (f"step {last['step']}", f"{last['eval_loss']:.4f}", f"{last['eval_bits_per_byte']:.4f}", "2 samples"):
        assert part in out
    for arguments, said in (([str(tmp_path)], "it is no run"), ([str(run), "--samples", "0"], "samples is 0")):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
