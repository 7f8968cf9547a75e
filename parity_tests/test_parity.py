"""The ladder holds in every precision, and each planted fault is caught by the lowest rung that can see it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxllm.model.kernels
import jaxllm.train
from convert.model_card import write_model_card
from jaxllm.config import PRESETS, ModelConfig, RouterConfig, TrainConfig
from jaxllm.errors import UserError
from jaxllm.model.kernels import causal_attention, grouped_loop, matmul
from jaxllm.train import loss, step
from parity_tests import command, training_rungs
from parity_tests.__main__ import main
from parity_tests.adapter_mutations import ADAPTER_MUTATIONS
from parity_tests.command import not_compared, plan_passes
from parity_tests.compare import TOLERANCES, Row, compare_arrays, compare_leaves
from parity_tests.executed import Executed
from parity_tests.forward import QUERIES_AND_KEYS, QUERY_KEY_GAIN, random_weights, torch_model
from parity_tests.jax_mutations import BFLOAT16_MUTATIONS, JAX_MUTATIONS, _bfloat16, _replaced
from parity_tests.ladder import Ladder
from parity_tests.mutations import MUTATIONS, FaultyAdamW
from parity_tests.options import RUNGS, ParityArgs
from parity_tests.replay import expert_flips
from parity_tests.rounding import LOST, Update, as_stored, still_float32
from parity_tests.settings import TAKEN, Settings, Sizes, make_plan
from parity_tests.text import read_tokens

TINY = PRESETS["tiny"]
# for tests with many models: the same parts, smaller
NARROW = dataclasses.replace(
    TINY, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, moe_intermediate_size=48,
    max_position_embeddings=128,
)  # fmt: skip
# not covered by tiny: several shared experts, larger latents, no final norm
OTHER = dataclasses.replace(
    NARROW, n_shared_experts=2, n_routed_experts=5, num_experts_per_tok=3, compression_ratio=2, final_norm=False
)
FORWARD = ("weights", "layers", "logits", "loss")
SMALL_STEPS = Sizes(3, 1, 36)
"""Beyond the low thresholds: steps and gradients then have one size, and fewer programs are compiled."""


@contextmanager
def low_thresholds() -> Iterator[None]:
    """Small batches are beyond them, and few sizes are compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal_attention, "BLOCK_QUERIES", 16)
        patch.setattr(causal_attention, "MAX_SPANS", 2)
        patch.setattr(loss, "CHUNK_ROWS", 32)
        patch.setattr(grouped_loop, "BLOCK_ROWS", (8, 16, 32))
        yield


@pytest.fixture(autouse=True)
def _low_thresholds(request):
    with ExitStack() as stack:
        if not request.node.get_closest_marker("slow"):
            stack.enter_context(low_thresholds())
        yield


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return read_tokens(TINY, 25_000, None, None)


def failures(ladder: Ladder, model, rungs=RUNGS) -> list[str]:
    return [
        f"{row.rung}: {row.what} of {row.leaf}, {row.relative_l2} ({row.note})"
        for _, rows in ladder.climb(model, rungs)
        for row in rows
        if not row.passed
    ]


def ladder_of(config: ModelConfig, tokens: np.ndarray, precision: str, **options):
    config = dataclasses.replace(config, dropout=0.0)
    weights = random_weights(config, options.pop("seed", 0))
    return Ladder(config, weights, tokens, precision, Settings(**options)), torch_model(config, weights, precision)


@pytest.fixture(scope="module")
def narrow(tokens):
    with low_thresholds():
        return ladder_of(NARROW, tokens, "float32", seq_len=100, steps=15, sizes=SMALL_STEPS)


@pytest.mark.slow  # `.ci/run` runs the whole ladder on a trained run of `tiny`
def test_tiny_in_float32(tokens):
    ladder, model = ladder_of(TINY, tokens, "float32")
    assert failures(ladder, model) == []
    assert len(ladder.curve.jax) == len(ladder.curve.torch) == 50
    assert ladder.curve.jax[-1] < ladder.curve.jax[0] - 1  # training reduced the loss


@pytest.mark.parametrize(
    "rungs", [pytest.param(RUNGS, marks=pytest.mark.slow, id="all"), ("layers", "logits", "gradients")]
)
def test_float64_agrees_to_its_precision(tokens, rungs):
    ladder = ladder_of(NARROW, tokens, "float64", seq_len=100, steps=15, sizes=SMALL_STEPS)
    assert failures(*ladder, rungs=rungs) == []


@pytest.mark.slow
def test_bfloat16(tokens):
    assert failures(*ladder_of(NARROW, tokens, "bfloat16", seq_len=100, steps=8)) == []


@pytest.mark.parametrize("rungs", [FORWARD, pytest.param(("gradients", "step"), marks=pytest.mark.slow)], ids="_".join)
def test_other_shapes(tokens, rungs):
    assert failures(*ladder_of(OTHER, tokens, "float64", seq_len=100, steps=5), rungs=rungs) == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_tiny_in_other_precisions(tokens, precision):
    assert failures(*ladder_of(TINY, tokens, precision)) == []


@pytest.fixture(scope="module")
def narrow_muon(tokens):
    with low_thresholds():
        return ladder_of(NARROW, tokens, "float32", seq_len=100, steps=15, sizes=SMALL_STEPS, optimizer="muon")


@pytest.mark.slow  # test_deepseek.py compares Muon in float64
def test_muon_in_float64(tokens):
    ladder = ladder_of(NARROW, tokens, "float64", seq_len=100, steps=15, optimizer="muon")
    assert failures(*ladder, rungs=("step", "trajectory")) == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_muon_in_other_precisions(tokens, precision):
    ladder = ladder_of(NARROW, tokens, precision, seq_len=100, steps=5, optimizer="muon")
    assert failures(*ladder, rungs=("step", "trajectory")) == []


ALIKE = {(m.rung, m.what, m.optimizer): name for name, m in reversed(MUTATIONS.items())}
"""The first fault of each comparison that must fail; the others are slow."""
OTHERWISE_SHOWN = {
    "mean_of_means",  # test_trainer.py
    "muon_without_nesterov", "muon_decay_in_the_gradient",  # test_deepseek.py compares an update with transformers'
}  # fmt: skip
QUICK = {*ALIKE.values()} - OTHERWISE_SHOWN


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MUTATIONS]
)
def test_a_planted_fault_is_caught_by_the_lowest_rung_that_can_see_it(request, name):
    mutation = MUTATIONS[name]
    ladder, model = request.getfixturevalue("narrow_muon" if mutation.optimizer == "muon" else "narrow")
    with mutation.plant(model):
        breaches = (row for _, rows in ladder.climb(model) for row in rows if not row.passed)
        caught = next(breaches, None)
    assert caught is not None, "nothing was caught"
    assert (caught.rung, caught.what) == (mutation.rung, mutation.what)
    # the fault is removed again, so that the next one is tested alone
    assert failures(ladder, model, FORWARD) == []


def test_faulty_adamw_without_a_mistake_is_adamw(narrow, monkeypatch):
    """Its mutations must be caught for their mistake, not because the optimizer is a different one."""
    monkeypatch.setattr(torch.optim, "AdamW", FaultyAdamW)
    assert failures(*narrow, rungs=("step",)) == []


def test_there_is_a_fault_for_every_rung():
    every = MUTATIONS | JAX_MUTATIONS | BFLOAT16_MUTATIONS | ADAPTER_MUTATIONS  # the last: test_lora.py
    assert {mutation.rung for mutation in every.values()} == set(RUNGS)


# faults of the Flax side

LEAST = dataclasses.replace(
    NARROW, hidden_size=32, num_hidden_layers=1, moe_intermediate_size=16, vocab_size=512,
    max_position_embeddings=64,
)  # fmt: skip
OF_A_RUN = {
    "decay_ends_early": {"schedule": "wsd", "warmup_steps": 2, "decay_steps": 8},
    "warmup_of_none_starts_at_zero": {"warmup_steps": 0},
    "documents_see_each_other": {"documents": "separate", "balance_loss": 1e-2, "router_z_loss": 1e-3},
}
"""Options of the run whose settings show the fault."""
QUICK_FAULTS = ("later_queries_give_keys_no_gradient",)


def least(tokens: np.ndarray, name: str, precision: str = "float32"):
    run = None
    if name in OF_A_RUN:
        sizes = {"batch_size": 2, "seq_len": 24, "steps": 20, "learning_rate": 1e-3}
        run = TrainConfig.from_options(model=LEAST, **sizes, **OF_A_RUN[name])
    return ladder_of(LEAST, tokens % 512, precision, seq_len=60, steps=10, run=run, sizes=None if run else SMALL_STEPS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK_FAULTS else pytest.mark.slow) for name in JAX_MUTATIONS]
)
def test_a_fault_of_the_flax_side_is_caught_by_the_lowest_rung_that_can_see_it(tokens, name):
    mutation, rungs = JAX_MUTATIONS[name], RUNGS
    if name in QUICK_FAULTS:
        rungs = (mutation.rung,)
    with low_thresholds():
        ladder, model = least(tokens, name)
        with mutation.plant(model):
            breaches = (row for _, rows in ladder.climb(model, rungs) for row in rows if not row.passed)
            caught = next(breaches, None)
    assert caught is not None, "nothing was caught"
    # these few rows have groups beyond the low threshold without biases, too
    whats = {mutation.what, mutation.what.removesuffix(", one expert for all")}
    assert caught.rung == mutation.rung
    assert caught.what in whats


# a step in bfloat16: what it does with the gradients is float32


def test_numbers_that_were_rounded_to_bfloat16_do_not_pass():
    row, values = Row("step", "first moments", "a", True, ""), np.linspace(0.1, 3, 100, dtype=np.float32)
    rounded = torch.from_numpy(values).bfloat16().float().numpy()
    assert still_float32(row, values).passed
    assert still_float32(row, values * 0).passed
    assert still_float32(row, rounded).note == LOST
    assert still_float32(row, rounded / np.float32(0.3) * np.float32(0.3)).note == LOST


def in_bfloat16(values: Any) -> Any:
    return jax.tree.map(lambda x: _bfloat16(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, values)


@contextmanager
def optimizer_in_bfloat16(which: str) -> Iterator[None]:
    def updated(original, *args):
        params, state = original(*args)
        return params, state._replace(**{which: in_bfloat16(getattr(state, which))})

    with _replaced(step, "update", updated):
        yield


@contextmanager
def accumulated_in_bfloat16() -> Iterator[None]:
    with _replaced(step, "gradients", lambda original, *args, **kw: in_bfloat16(original(*args, **kw))):
        yield


@pytest.mark.slow
def test_a_step_of_a_bfloat16_model_is_float32(tokens):
    """A right step agrees in small shapes, too, whose gradients differ by a tenth of themselves in some leaves."""
    config = dataclasses.replace(NARROW, num_hidden_layers=1, **SHAPES["three hidden"])
    run = of_a_run(config, optimizer="adamw", learning_rate=4e-3)

    def whats(*rungs: str) -> set[str]:
        jax.clear_caches()
        ladder, model = ladder_of(config, tokens, "bfloat16", seq_len=100, steps=5, run=run)
        return {row.what.partition(",")[0] for _, rows in ladder.climb(model, rungs) for row in rows if not row.passed}

    with low_thresholds():
        assert whats("step") == set()
        with optimizer_in_bfloat16("mu"):
            assert "first moments" in whats("step")
        with optimizer_in_bfloat16("nu"):
            assert whats("step") == {"second moments"}
        with accumulated_in_bfloat16():
            assert "gradients" in whats("gradients")
    jax.clear_caches()


def parts_that_differ(ladder: Ladder, model) -> list[str]:
    ((_, rows),) = ladder.climb(model, ("parts",))
    return [*dict.fromkeys(row.what for row in rows if not row.passed)]


def test_float32_that_is_lost_inside_bfloat16_is_seen_in_each_part(tokens):
    """Each part gets the same input in both frameworks, so that all faults can be planted at once."""
    assert parts_that_differ(*ladder_of(NARROW, tokens, "bfloat16", seq_len=100)) == []
    with ExitStack() as stack:
        for mutation in BFLOAT16_MUTATIONS.values():
            stack.enter_context(mutation.plant(None))
        differ = parts_that_differ(*ladder_of(NARROW, tokens, "bfloat16", seq_len=100))
    assert {mutation.what for mutation in BFLOAT16_MUTATIONS.values()} <= {*differ}


@pytest.mark.slow
@pytest.mark.parametrize("name", BFLOAT16_MUTATIONS)
def test_float32_that_is_lost_is_caught_by_the_part_that_loses_it(tokens, name):
    mutation = BFLOAT16_MUTATIONS[name]
    with mutation.plant(None):
        ladder, model = ladder_of(NARROW, tokens, "bfloat16", seq_len=100)
        # attention is far from even, so `layers` sees some of them too, behind the part that loses it
        found = ladder.climb(model, ("weights", "layers", mutation.rung))
        breaches = [row for _, rows in found for row in rows if not row.passed]
    assert {row.rung for row in breaches} <= {"layers", mutation.rung}
    assert next(row.what for row in breaches if row.rung == mutation.rung) == mutation.what


# no false alarms

SHAPES = {
    "one layer": {"num_hidden_layers": 1},
    "one expert": {"n_routed_experts": 1, "num_experts_per_tok": 1},
    "one of the experts": {"num_experts_per_tok": 1},
    "all experts": {"num_experts_per_tok": 7},
    "odd heads": {"hidden_size": 60, "num_attention_heads": 5},
    "three hidden": {"moe_intermediate_size": 3},
}


def of_a_run(model: ModelConfig, **options) -> TrainConfig:
    """Settings as train.py has them by default, without auxiliary losses."""
    sizes = {"batch_size": 4, "seq_len": 24, "steps": 40}
    return TrainConfig.from_options(model=model, **sizes, **options)


def test_a_router_whose_gradient_is_zero_in_theory_raises_no_alarm(tokens):
    """With one expert a token the gate is 1: what the router gets is rounding. Odd heads and a size of 3 beside it."""
    odd = SHAPES["odd heads"] | SHAPES["three hidden"] | SHAPES["one of the experts"]
    config = dataclasses.replace(NARROW, num_hidden_layers=1, **odd)
    ladder, model = ladder_of(config, tokens, "float32", seq_len=100, steps=5, run=of_a_run(config))
    found = dict(ladder.climb(model, ("layers", "gradients")))
    assert [row for rows in found.values() for row in rows if not row.passed] == []
    assert any("zero in theory" in row.note for row in found["gradients"])
    with MUTATIONS["latent_detached"].plant(model):
        assert failures(ladder, model, ("gradients",)) != []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("shape", SHAPES)
def test_right_models_raise_no_alarm(tokens, shape, optimizer, precision, seed):
    config = dataclasses.replace(NARROW, **SHAPES[shape])
    rate = 8e-3 if optimizer == "muon" else 4e-3  # the defaults
    run = of_a_run(config, optimizer=optimizer, learning_rate=rate)
    with low_thresholds():
        ladder, model = ladder_of(config, tokens, precision, seq_len=100, steps=10, run=run, seed=seed)
        assert failures(ladder, model) == []


def test_one_token_is_compared(tokens):
    assert failures(*ladder_of(LEAST, tokens % 512, "float32", seq_len=1), rungs=(*FORWARD, "padding")) == []


# what is compared follows from the code and the run


@pytest.mark.parametrize(
    ("module", "name", "value", "size"),
    [
        (causal_attention, "BLOCK_QUERIES", 200, "tokens"),
        (loss, "CHUNK_ROWS", 5000, "all"),
        (grouped_loop, "BLOCK_ROWS", (16, 7000), "all"),
    ],
)
def test_a_changed_threshold_widens_the_ladder(monkeypatch, module, name, value, size):
    monkeypatch.setattr(module, name, value)
    wide = make_plan(TINY, "float32", Settings()).wide
    limit = value[-1] if isinstance(value, tuple) else value
    assert (wide.tokens if size == "tokens" else wide.tokens * wide.rows) > limit


def test_more_rows_are_decoded_where_few_rows_are_more(monkeypatch, tokens):
    rows = [len(ladder_of(LEAST, tokens % 512, "float32")[0].generation.given[0].prompts)]
    monkeypatch.setattr(matmul, "FEW_ROWS", 64)
    rows.append(len(ladder_of(LEAST, tokens % 512, "float32")[0].generation.given[0].prompts))
    assert rows == [16, 32]


def test_evaluation_is_compared_beyond_a_chunk_of_the_loss(tokens):
    ladder, _ = ladder_of(LEAST, tokens % 512, "float32")
    assert all(batch.size > loss.CHUNK_ROWS for batch in ladder.training.evaluated)


THRESHOLDS = {"BLOCK_QUERIES", "MAX_SPANS", "CHUNK_ROWS", "GPU_CHUNK_ROWS", "BLOCK_ROWS", "FEW_ROWS"}
OTHER_NUMBERS = {
    "IGNORED", "MAX_PROGRAMS", "SMALL_GROUP", "STEPS", "TILE", "SWIGLU_WIDTH", "DEPTH", "RANKS", "ROUTED_GROUPS",
    "SHARED_GROUP", "WORST_ROW",
}  # fmt: skip
"""A label; programs that are kept; how blocks are padded; Newton-Schulz steps; a GPU's; the self-check's cases."""


def test_every_size_in_the_code_is_known_to_the_ladder():
    """A new number in the kernels or the step is a threshold, which `settings` must read, or is named above."""
    found = set()
    for package in (jaxllm.model.kernels, jaxllm.train):
        for info in pkgutil.iter_modules(package.__path__):
            for name, value in vars(importlib.import_module(f"{package.__name__}.{info.name}")).items():
                of_numbers = isinstance(value, tuple) and all(type(part) is int for part in value)
                if name.lstrip("_").isupper() and (type(value) is int or of_numbers):
                    found.add(name)
    assert found - OTHER_NUMBERS == THRESHOLDS


def test_the_rungs_have_the_settings_of_the_run():
    options = {
        "optimizer": "muon", "schedule": "wsd", "warmup_steps": 0, "decay_steps": 100, "grad_accum": 8, "remat": True,
        "balance_loss": 1e-3, "router_z_loss": 1e-4, "weight_decay": 0.0, "learning_rate": 3e-3, "seq_len": 256,
    }  # fmt: skip
    run = TrainConfig.from_options(model=TINY, steps=200, **options)
    plan = make_plan(TINY, "float32", Settings(run=run))
    taken = plan.config.options()
    changed = {"grad_accum": 3, "decay_steps": 25}
    assert {name: taken[name] for name in options} == options | changed
    assert plan.sizes == Sizes(3, 8, 256)
    assert plan.wide == plan.sizes  # beyond every threshold
    assert plan.notes == ["grad_accum 3 (the run's: 8)", "the schedule of 200 steps on 50, 0 of them warm-up"]


OF_A_STEP = {
    "model", "precision", "seq_len", "batch_size", "grad_accum", "optimizer", "steps", "epochs", "warmup_steps",
    "decay_steps",
}  # fmt: skip
"""Options of a run that the rungs have, or say what they have instead, besides `TAKEN`."""
NAMED_IF_SET = {
    "lora_rank": {"lora_rank": 8, "init": Path("base")}, "parallel": {"parallel": "pmap"}, "mesh": {"mesh": "data=2"},
    "documents": {"documents": "separate"},
}  # fmt: skip
"""Options that change a step, and whose verdict names what of them is not compared."""
NOT_OF_A_STEP = {
    "preset", "recipe", "run_dir", "overwrite", "seed", "init", "adapter", "kernels", "coordinator", "num_processes",
    "process_id", "lora_alpha", "lora_targets", "lora_rslora", "lora_base_dtype", "data", "data_config", "data_split",
    "eval_data", "hold_out",
    "data_revision", "skip_data", "text_field", "tokenizer", "special_tokens_in_text", "save_every", "keep_checkpoints",
    "keep_every", "strict", "max_nonfinite", "log_every", "log_format", "log_to", "eval_every", "eval_samples",
    "peak_tflops", "prompts", "sample_tokens", "temperature", "top_p", "data_streams",
}  # fmt: skip
"""Where weights and data come from, which of several right kernels runs, what is written."""


def left_out(run: TrainConfig) -> list[str]:
    args = ParityArgs()
    passes, settings = plan_passes(args, run)
    ladder = SimpleNamespace(not_compared=[], plan=make_plan(run.model, "float32", settings))
    return not_compared(args, passes, [ladder], run)  # pyright: ignore[reportArgumentType]


def test_each_option_of_a_run_is_compared_or_named():
    run = TrainConfig.from_options(model=TINY)
    options = run.options().keys()
    assert options - OF_A_STEP - {*TAKEN} - NAMED_IF_SET.keys() == NOT_OF_A_STEP & options
    for changes in NAMED_IF_SET.values():
        assert len(left_out(run.with_options(**changes))) > len(left_out(run)), changes


def test_what_quick_leaves_out_is_named(tokens):
    (only,), _ = plan_passes(ParityArgs(quick=True), TrainConfig.from_options(model=LEAST, batch_size=8, seq_len=24))
    ladder, model = ladder_of(LEAST, tokens % 512, "float32", **{
        name: getattr(only.settings, name) for name in ("steps", "run", "widens", "greedy")
    })  # fmt: skip
    assert ladder.plan.sizes == Sizes(1, 2, 24)
    ((_, rows),) = ladder.climb(model, ("generation",))
    assert {row.what for row in rows} == {"cached logits"}
    assert "greedy tokens, and the end of a text" in ladder.not_compared


def test_adapters_are_named_where_peft_is_missing(monkeypatch):
    run = TrainConfig.from_options(model=TINY, **NAMED_IF_SET["lora_rank"])
    monkeypatch.setattr(command, "has_peft", lambda: False)
    assert [line for line in left_out(run) if "pip install 'peft>=0.21'" in line]
    assert "adapters" not in plan_passes(ParityArgs(), run)[0][0].rungs
    for asked in (run, TrainConfig.from_options(model=TINY)):
        with pytest.raises(UserError, match="rungs has adapters, and"):
            plan_passes(ParityArgs(rungs=("adapters",)), asked)
    monkeypatch.setattr(command, "has_peft", lambda: True)
    assert "adapters" in plan_passes(ParityArgs(), run)[0][0].rungs
    assert [line for line in left_out(run) if "more than one step of the run's adapters" in line]


def test_documents_that_do_not_see_each_other_are_compared(tokens):
    """At the run's settings: documents of several lengths in a row, with the auxiliary losses of each."""
    run = TrainConfig.from_options(
        model=LEAST, batch_size=2, seq_len=40, steps=20, documents="separate", balance_loss=1e-2, router_z_loss=1e-3
    )
    ladder, model = ladder_of(LEAST, tokens % 512, "float64", seq_len=60, steps=10, run=run)
    assert failures(ladder, model, ("evaluation",)) == []


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_on_documents_that_do_not_see_each_other(tokens, optimizer):
    run = TrainConfig.from_options(
        model=LEAST, batch_size=2, seq_len=40, steps=20, grad_accum=3, documents="separate", balance_loss=1e-2,
        router_z_loss=1e-3, optimizer=optimizer,
    )  # fmt: skip
    ladder, model = ladder_of(LEAST, tokens % 512, "float64", seq_len=60, steps=10, run=run)
    assert failures(ladder, model, ("gradients", "step", "trajectory")) == []


def test_code_that_never_ran_is_named(tmp_path, monkeypatch):
    source = """
def chosen(a, b):
    both = 1 if a else 2
    if b:
        both += 1
    else:
        both -= 1
    if both < 0:
        raise ValueError("not reached")
    return both

def never():
    return 1
"""
    for name in ("ran", "unread"):
        (tmp_path / "planted" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "planted" / f"{name}.py").write_text(source)
    (tmp_path / "planted" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    executed = Executed(("planted",))
    with executed.watching():
        importlib.import_module("planted.ran").chosen(True, False)
    assert sys.gettrace() is None or "executed" not in str(sys.gettrace())
    assert [str(missed) for missed in executed.missed()] == ["planted/ran.py (never, 3, 5)", "planted/unread.py"]


@pytest.mark.slow
def test_what_jax_does_not_trace_is_named(tokens):
    jax.clear_caches()
    executed = Executed()
    with executed.watching():
        assert failures(*ladder_of(LEAST, tokens % 512, "float32", seq_len=60), rungs=("logits",)) == []
    missed = {missed.file: missed for missed in executed.missed()}
    assert "model/decoder.py" in missed
    assert "CustomLLM.decode" in missed["model/decoder.py"].functions
    assert missed["train/muon.py"].whole
    assert "model/kernels/swiglu.py" in missed  # its gradient


def test_near_ties_are_distinguished_from_wrong_choices():
    scores = np.asarray([[0.9, 0.5, 0.5 - 1e-7, 0.1]])
    none, router = np.zeros(4), RouterConfig()
    assert expert_flips(scores, none, np.asarray([[1, 0]]), router).count == 0
    tie = expert_flips(scores, none, np.asarray([[0, 2]]), router)
    assert tie.count == 1
    assert tie.margin == pytest.approx(1e-7)
    assert expert_flips(scores, none, np.asarray([[0, 3]]), router).margin == pytest.approx(0.4)
    # the best expert is missing: a tie between the two worst is no excuse
    assert expert_flips(scores, none, np.asarray([[1, 2]]), router).margin == pytest.approx(0.4)
    # the bias decides the choice
    assert expert_flips(scores, np.asarray([0, 0, 0, 0.45]), np.asarray([[0, 3]]), router).count == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "wrong"),
    [
        (("gradients",), {"gradients"}),
        # they share a program
        (("step", "trajectory"), {"gradient norm", "first moments", "second moments", "update"}),
    ],
)
def test_a_near_tie_is_replayed_and_reported(tokens, training, wrong):
    """If rounding changes a choice, the replay shows that nothing else differs."""
    config = NARROW
    weights = random_weights(config)
    router = weights.params["decoder_layers"]["mlp"]["router"]["weight"]  # (L,D,E)
    bias = weights.routing_bias["decoder_layers"]["mlp"]["routing_bias"]
    # in every layer, two experts are a near tie for the second place
    router[..., 1], bias[...] = router[..., 0], [1, 1 - 1e-6, 2, 0, 0, 0, 0]
    model = torch_model(config, weights)
    for layer in model.decoder_layers:
        layer.mlp.routing_bias[1] += 2e-6  # PyTorch prefers the second of the two, Flax the first
    ladder = Ladder(config, weights, tokens, "float32", Settings(seq_len=100, steps=5, sizes=SMALL_STEPS))
    found = dict(ladder.climb(model, ("layers", "logits", "loss", *training)))
    assert [row for rows in found.values() for row in rows if not row.passed] == []
    choice = next(row for row in found["layers"] if row.what == "expert choice")
    assert "near ties" in choice.note
    assert 0 < choice.max_error < TOLERANCES["float32"].near_tie
    for rung in training:
        assert found[rung][0].what == "expert choice"
    assert ladder.curve.replayed == ("trajectory" in training)
    # the replay hides no fault
    with MUTATIONS["gates_detached"].plant(model):
        (_, rows), *_ = ladder.climb(model, training[:1])
    assert {row.what.removesuffix(", norm below the limit") for row in rows if not row.passed} == wrong


@pytest.mark.slow
def test_what_training_amplifies_is_distinguished_from_a_fault(narrow, monkeypatch):
    """Where rounding grows beyond the tolerance, two correct programs may differ by what rounding does, not by more."""
    ladder, model = narrow
    strict = ladder.tolerances.trajectory._replace(relative_l2=2e-7)  # as if this calm training were a wild one
    subject = ladder.training.subject
    tolerances = subject.tolerances._replace(trajectory=strict)
    monkeypatch.setattr(ladder.training, "subject", subject._replace(tolerances=tolerances))
    ((_, rows),) = ladder.climb(model, ("trajectory",))
    assert [row for row in rows if not row.passed] == []
    parameters = [row for row in rows if row.what == "parameters"]
    assert max(row.relative_l2 for row in parameters) > strict.relative_l2
    assert all(row.tolerance.endswith("amplified") for row in parameters)
    assert any("10 roundings" in row.note for row in rows)
    with MUTATIONS["cosine_with_a_floor"].plant(model):
        assert any("losses" in failure for failure in failures(ladder, model, ("trajectory",)))
    monkeypatch.setattr(training_rungs, "MAX_AMPLIFIED", strict.relative_l2)  # too wild to be compared
    assert failures(ladder, model, ("trajectory",)) != []


def test_a_cancelled_gradient_is_distinguished_from_a_wrong_one(tokens):
    """With nearly equal values and even attention, the gradient of a query is a small difference of large terms."""
    weights = random_weights(NARROW)
    for name in ("token_embeddings", "position_embeddings"):
        table = weights.params[name]["weight"]  # (V|P,D)
        table[:] = table[0] + 0.1 * table
    attention = weights.params["decoder_layers"]["self_attn"]
    for name in QUERIES_AND_KEYS & attention.keys():
        attention[name]["weight"] *= 0.5 / QUERY_KEY_GAIN
    settings = Settings(seq_len=100, steps=15, sizes=SMALL_STEPS)
    ladder, model = Ladder(NARROW, weights, tokens, "float32", settings), torch_model(NARROW, weights)
    (_, rows), *_ = ladder.climb(model, ("gradients",))
    assert [row for row in rows if not row.passed] == []
    limit = TOLERANCES["float32"].gradient.relative_l2
    excused = {(row.what, row.leaf): row.note for row in rows if row.relative_l2 > limit}
    assert set(excused.values()) == {"at most 6e-09 of all leaves together"}
    assert {leaf for _, leaf in excused} >= {f"decoder_layers.1.self_attn.{name}_proj_u.weight" for name in "qk"}
    with MUTATIONS["scale_missing"].plant(model):
        (_, rows), *_ = ladder.climb(model, ("gradients",))
    assert excused.keys() <= {(row.what, row.leaf) for row in rows if not row.passed}


@pytest.mark.slow
def test_two_layers_at_full_width(tokens):
    config = dataclasses.replace(PRESETS["customllm-1b"], num_hidden_layers=2)
    assert failures(*ladder_of(config, tokens, "float32"), rungs=FORWARD) == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_two_layers_at_full_width_train(tokens, precision):
    config = dataclasses.replace(PRESETS["customllm-1b"], num_hidden_layers=2)
    assert failures(*ladder_of(config, tokens, precision)) == []


@pytest.mark.slow
def test_the_whole_customllm_1b(tokens):
    assert failures(*ladder_of(PRESETS["customllm-1b"], tokens, "float32"), rungs=FORWARD) == []


def test_a_small_update_may_differ_by_how_each_parameter_is_rounded():
    before = np.linspace(0.01, 0.1, 50, dtype=np.float32)
    failed, tolerance = Row("step", "update", "a", False, "", relative_l2=2e-4), TOLERANCES["float32"].update
    ours = before + np.float32(1e-5)
    rounded, wrong = np.nextafter(ours, np.float32(1)), ours + 3 * np.spacing(ours)
    assert as_stored(failed, Update(before, ours, rounded), tolerance).passed
    assert not as_stored(failed, Update(before, ours, wrong), tolerance).passed
    assert not as_stored(failed, Update(before, ours, ours * np.nan), tolerance).passed


@pytest.mark.slow
def test_a_fault_of_a_small_update_is_seen_at_a_higher_rate(tokens):
    """At a rate of 1e-6, decay left out changes less than half a unit in the last place."""
    sizes = {"batch_size": 2, "seq_len": 24, "steps": 20, "learning_rate": 1e-6, "optimizer": "adamw"}
    run = TrainConfig.from_options(model=LEAST, **sizes)
    with low_thresholds():
        ladder, model = ladder_of(LEAST, tokens % 512, "float32", seq_len=60, steps=10, run=run)
        ((_, rows),) = ladder.climb(model, ("step",))
        assert [row for row in rows if not row.passed] == []
        hidden = {row.leaf for row in rows if "at a learning rate of 0.01" in row.note}
        assert len(hidden) > 20
        faulty = type("WithoutDecay", (FaultyAdamW,), {"decays": False})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim, "AdamW", faulty)
            ((_, rows),) = ladder.climb(model, ("step",))
    assert {row.what.partition(",")[0] for row in rows if not row.passed} == {"update"}
    assert len({row.leaf for row in rows if not row.passed} & hidden) > 20


def test_nan_never_passes():
    values, tolerance = np.arange(3.0), TOLERANCES["float32"].forward
    assert compare_arrays("", "", "", values, values, tolerance).passed
    assert not compare_arrays("", "", "", values, np.full((3,), np.nan), tolerance).passed
    assert not compare_arrays("", "", "", np.full((3,), np.nan), np.full((3,), np.nan), tolerance).passed


def test_an_infinite_gradient_excuses_nothing():
    theirs = {"a": np.zeros(1), "b": np.full(1, 2.0)}
    rows = compare_leaves("", "", {"a": np.full(1, np.inf), "b": np.ones(1)}, theirs, TOLERANCES["float32"].gradient)
    assert not any(row.passed for row in rows)


def test_the_command_reports_a_planted_fault(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a short text, repeated as often as necessary\n" * 40)
    arguments = ["--rungs", "weights", "layers", "--text", str(text), "--out", str(tmp_path / "out"), "--seq-len", "60"]
    assert main(arguments) == 0
    assert "The two frameworks agree." in capsys.readouterr().out
    assert main([*arguments, "--mutate", "rope_halves_swapped"]) == 1
    assert "BREACH, first in: attention of layer 0 (rung layers)" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert report["passed"] is False
    assert report["first_divergence"] == "attention of layer 0 (rung layers)"
    assert {"max_error", "relative_l2", "cosine", "leaf", "tolerance", "passed"} <= report["rows"][0].keys()
    assert (tmp_path / "out" / "parity.png").read_bytes().startswith(b"\x89PNG")
    assert "BREACH, first in: attention of layer 0" in (tmp_path / "out" / "parity.html").read_text()


def test_the_model_card_links_the_page_of_these_weights(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    page, card = tmp_path / "run" / "parity.html", tmp_path / "out" / "README.md"

    def write() -> str:
        write_model_card(tmp_path / "run", tmp_path / "out", LEAST, random_weights(LEAST), {"float32"})
        return card.read_text()

    def compared(**changes: Any) -> None:
        page.write_text("agrees")
        found = {"passed": True, "mutation": None, "model": "run"} | changes
        (tmp_path / "run" / "parity.json").write_text(json.dumps(found))

    assert "parity.html" not in write()
    for changes in ({"passed": False}, {"mutation": "rope_halves_swapped"}, {"model": "random weights of tiny"}):
        compared(**changes)
        assert "parity.html" not in write()
    compared()
    assert "(parity.html)" in write()
    assert (tmp_path / "out" / "parity.html").read_text() == "agrees"
    os.utime(tmp_path / "run" / "parity.json", (0, 0))  # a checkpoint came later
    assert "parity.html" not in write()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--mutate", "everything"], "mutate is 'everything': choose one of weight_transposed"),
        (["--text", "nowhere.txt"], "text is 'nowhere.txt'"),
        (["--seq-len", "0"], "seq_len is 0"),
        (["--steps", "2"], "steps is 2: it must be at least 5"),
        (["--seed", "-1"], "seed is -1"),
        (["--text", __file__.removesuffix(".py")], "text is"),
        (["nowhere"], "'nowhere' is neither a run folder nor an exported model"),
    ],
)
def test_bad_input_is_refused_in_one_line(options, part, capsys, tmp_path):
    assert main([*options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
