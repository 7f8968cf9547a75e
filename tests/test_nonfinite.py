"""Steps whose loss or gradient is not finite: they change nothing, are counted and can be looked at again."""

from __future__ import annotations

import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import train
from jaxllm.config import TrainConfig
from jaxllm.data.stream import ProcessBatches
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.files import read_json
from jaxllm.model.batch import TokenBatch
from jaxllm.model.layers import ParameterFacts
from jaxllm.run import replay
from jaxllm.run.evaluation import Evaluator
from jaxllm.store.checkpoint import ResumeState, Weights, newest_checkpoint
from jaxllm.store.checkpoint_writer import write_run
from jaxllm.store.history import History
from jaxllm.store.metrics_file import read_metrics
from jaxllm.store.source import tokenizer_files
from jaxllm.train.adamw import UpdateScalars, adamw_update
from jaxllm.train.computation import Computation
from jaxllm.train.optim import OptimizerState, StepNumbers, learning_rate
from tests.configs import small


@pytest.fixture(scope="module")
def poisoned(run, narrow, tmp_path_factory):
    """A run resumed from step 10 of the narrow one, with one row of the embeddings that is not finite."""
    folder = tmp_path_factory.mktemp("runs") / "poisoned"
    half = shutil.copytree(run, folder.parent / "half")
    shutil.rmtree(half / "checkpoints" / "20")
    config = TrainConfig.from_dict(read_json(half / "train_config.json"))
    state, training = newest_checkpoint(half).state(Computation.of(config))
    data, tokenizer = config.data, load_tokenizer(str(half / "tokenizer"))
    stream = ProcessBatches(data, config.seed, 1, tokenizer, 0, data.batch_size)
    stream.seek(training.positions)
    batches = [set(stream.next_rows(1).ravel().tolist()) for _ in range(10)]
    token = next(token for token in range(300) if 2 <= sum(token in batch for batch in batches) <= 5)
    params = jax.tree.map(np.array, state.params)
    params["token_embeddings"]["weight"][token, 3] = np.inf
    rest = ResumeState(state.opt_state, state.step, state.dropout_key, training.positions, training.history)
    weights = Weights(params, state.routing_bias)
    write_run(folder, config.model, weights, (config, rest), tokenizer_files(run / "tokenizer"))
    assert train.main([*narrow, "--max-nonfinite", "20", "--run-dir", str(folder)]) == 0
    return folder, token


def bad_steps(folder) -> list[dict]:
    return [record for record in read_metrics(folder) if "nonfinite_loss" in record]


def test_nonfinite_steps_are_counted_and_logged_with_their_position(poisoned):
    poisoned, _ = poisoned
    bad = bad_steps(poisoned)
    assert 2 <= len(bad) <= 5  # the batches that hold the token
    end = [record for record in read_metrics(poisoned) if "train_runtime" in record][-1]
    assert end["nonfinite_steps"] == len(bad)
    assert math.isfinite(end["train_loss"])
    for record in bad:
        assert record["nonfinite_loss"] in ("nan", "inf")
        drawn = 4 * (record["step"] - 1)  # rows of the steps before
        assert record["position"]["0"]["drawn"] == drawn
        assert record["position"]["0"]["source"]["pass"] >= 0
    for line in (poisoned / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_a_nonfinite_step_changes_only_the_step_count(run):
    """Bit for bit, with moments, bias and schedule; the same step on other rows changes all of them."""
    config, token = TrainConfig.from_dict(read_json(run / "train_config.json")), 299
    config = config.with_options(warmup_steps=0)
    state = jax.jit(Computation.of(config).init_state)()
    weight = state.params["token_embeddings"]["weight"]
    state.params["token_embeddings"]["weight"] = weight.at[token].set(jnp.nan)
    step = functools.partial(
        jax.jit(Computation.of(config).train_step), numbers=StepNumbers.of(config.optim, config.schedule)
    )
    rows = np.random.default_rng(0).integers(0, token, (1, config.data.batch_size, config.data.seq_len), np.int32)
    good, metrics = step(state, TokenBatch(rows))
    assert np.isfinite(metrics.loss)
    rows[0, 2, 5] = token
    bad, metrics = step(state, TokenBatch(rows))
    assert not np.isfinite(metrics.loss)
    assert float(metrics.learning_rate) == pytest.approx(config.optim.learning_rate)  # the schedule stands where it was
    assert int(bad.step) == int(good.step) == 1
    jax.tree.map(np.testing.assert_array_equal, bad._replace(step=0), state._replace(step=0))
    for name in ("params", "opt_state", "routing_bias"):
        with pytest.raises(AssertionError):
            jax.tree.map(np.testing.assert_array_equal, getattr(good, name), getattr(state, name))


def test_the_update_equals_optax():
    """AdamW with decay, over steps of which one is not finite and changes nothing; moments to the last bit."""
    config = TrainConfig.from_options(beta1=0.9, beta2=0.99, weight_decay=0.1, warmup_steps=2)
    facts = {"a": ParameterFacts(("hidden", "latent"), decays=True), "b": ParameterFacts(("norm",), decays=False)}
    schedule = functools.partial(learning_rate, StepNumbers.of(config.optim, config.schedule))
    theirs = optax.adamw(schedule, 0.9, 0.99, 1e-8, weight_decay=0.1, mask={"a": True, "b": False})
    params = other_params = {"a": jnp.ones((3, 5)), "b": jnp.ones(7)}
    state, other = OptimizerState.zeros(config.model, config.optim, params), theirs.init(params)

    def update(grads, state: OptimizerState, params, finite: bool):
        rate = schedule(state.count)
        scalars = UpdateScalars(state.count + int(finite), rate, jnp.bool(finite))
        params, mu, nu = adamw_update(config.optim, grads, state.mu, params, facts, state.nu, scalars)
        return params, OptimizerState(scalars.count, mu, nu)

    for seed in range(4):
        keys = dict(zip("ab", jax.random.split(jax.random.key(seed)), strict=True))
        grads = jax.tree.map(lambda leaf, key: jax.random.normal(key, leaf.shape), params, keys)
        params, state = update(grads, state, params, True)
        updates, other = theirs.update(grads, other, other_params)
        other_params = optax.apply_updates(other_params, updates)
        jax.tree.map(np.testing.assert_array_equal, state, OptimizerState(*other[0]))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), params, other_params)
        infinite = jax.tree.map(lambda g: g * jnp.inf, grads)
        same = update(infinite, state, params, False)
        jax.tree.map(np.testing.assert_array_equal, same, (params, state))


def test_a_replay_repeats_the_batch_and_names_the_first_tensor(poisoned, capsys):
    poisoned, poison = poisoned
    shutil.rmtree(poisoned / "checkpoints" / "20")  # from step 10 on, over good and bad steps
    step = bad_steps(poisoned)[-1]["step"]
    before = sorted(path for path in poisoned.rglob("*") if path.is_file())
    capsys.readouterr()
    assert replay.main([str(poisoned), str(step)]) == 0
    said = capsys.readouterr().out
    labels = load_file(poisoned / "replay" / str(step) / "batch.safetensors")["labels"]
    row, token = np.argwhere(labels[0] == poison)[0]
    assert f"not finite: embeddings, micro-batch 0, row {row}, token {token} (id {poison}" in said
    report = json.loads((poisoned / "replay" / str(step) / "report.json").read_text())
    assert report["nonfinite"][0]["tokens"] == (labels == poison).sum()
    assert report["nonfinite"][1]["where"] == "layer 0: input norm"
    names = [found["where"] for found in report["nonfinite"]]
    assert names.index("logits") < names.index("loss") < names.index("gradient of lm_head.weight")
    after = [path for path in poisoned.rglob("*") if path.is_file() and "replay" not in path.parts]
    assert sorted(after) == before  # nothing else is touched
    good = next(s for s in range(11, 21) if s not in [record["step"] for record in bad_steps(poisoned)])
    assert replay.main([str(poisoned), str(good)]) == 0
    said = capsys.readouterr().out
    assert "Everything in it is finite" in said
    logged = next(r["loss"] for r in read_metrics(poisoned) if r["step"] == good and "loss" in r)
    assert round(float(said[said.index(": loss ") + 7 :].split()[0]), 4) == logged


@pytest.mark.slow
@pytest.mark.parametrize("dense", [1, 3])
def test_a_step_of_a_model_with_dense_layers_is_examined(dense):
    """Its router's tensors are of the layers with experts alone; gradients are named by the layers' numbers."""
    model = small(first_k_dense_replace=dense, intermediate_size=48)
    computation = Computation.of(TrainConfig.from_options(model=model, seq_len=8, batch_size=2))
    state = jax.jit(computation.init_state)()
    stack = state.params["dense_layers"]["mlp"]["down_proj"]
    stack["weight"] = stack["weight"].at[dense - 1].set(jnp.nan)
    found, _ = replay.examine(computation.optim, computation.graph, state, TokenBatch(np.ones((1, 2, 8), np.int32)))
    names = [one.where for one in found]
    assert names[0] == f"layer {dense - 1}: experts"
    scores = [name for name in names if name.endswith("router scores")]
    assert scores == [f"layer {layer}: router scores" for layer in range(dense, 3)]
    gradients = [name.split()[-1].split(".") for name in names if name.startswith("gradient of ")]
    order = [int(keys[1]) for keys in gradients if keys[0].endswith("layers")]
    assert order == sorted(order, reverse=True)
    assert {*order} == {0, 1, 2}
    assert {keys[0] for keys in gradients if keys[0].endswith("layers") and int(keys[1]) >= dense} <= {"decoder_layers"}
    assert gradients[-1] == ["token_embeddings", "weight"]


def test_after_max_nonfinite_steps_the_run_stops_and_keeps_its_checkpoints(narrow, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--learning-rate", "1e30", "--warmup-steps", "0", "--max-nonfinite", "3", "--save-every", "1"]
    assert train.main([*narrow, *options, "--run-dir", str(run)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    bad = bad_steps(run)
    assert [record["step"] for record in bad] == [bad[0]["step"] + i for i in range(3)]
    assert "3 steps in a row" in error
    assert f"`python -m jaxllm.run.replay RUN {bad[0]['step']}` shows where it begins" in error
    assert train.main([*narrow, *options, "--run-dir", str(run)]) == 2  # and it comes to the same end again
    assert "3 steps in a row" in capsys.readouterr().err
    assert replay.main([str(run), str(bad[0]["step"])]) == 0
    assert "The first value that is not finite: " in capsys.readouterr().out


def test_a_run_with_nonfinite_evaluations_ends_normally(narrow, tmp_path, capsys, monkeypatch):
    evaluate = Evaluator.__call__
    monkeypatch.setattr(Evaluator, "__call__", lambda *a: evaluate(*a) | {"eval_loss": math.nan})
    for _ in range(2):
        assert train.main([*narrow, "--sample-tokens", "0", "--run-dir", str(tmp_path / "run")]) == 0
        assert "Evaluation loss nan" in capsys.readouterr().out


def test_a_step_that_cannot_be_replayed_is_refused(run, tmp_path, capsys):
    assert replay.main([str(run), "10"]) == 2
    assert "the oldest checkpoint that is left is that of step 10" in capsys.readouterr().err
    assert replay.main([str(run), "21"]) == 2
    assert "has 20 steps" in capsys.readouterr().err
    assert replay.main([str(tmp_path / "none"), "3"]) == 2
    assert "is not a training run" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_history_detects_loss_spikes():
    rng, history = np.random.default_rng(0), History()
    losses = 3 + 2 * np.exp(-np.arange(400) / 50) + 0.05 * rng.standard_normal(400)
    losses[[3, 200, 300]] += 1.0  # the first comes where losses still fall steeply
    found = {step: history.add_step(float(loss), 1.0) for step, loss in enumerate(losses)}
    assert [step for step, kind in found.items() if kind] == [200, 300]
    assert history.add_step(3.0, math.inf) == "nonfinite"
    assert history.mean_loss() == pytest.approx(losses.mean())
    assert History.from_json(json.loads(json.dumps(history.to_json()))) == history
