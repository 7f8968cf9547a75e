"""Runs that train adapters: what their program computes and holds, how they are saved, resumed, merged and refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from flax import nnx
from jax.experimental import pallas as pl

import train
from convert import fp8
from convert.__main__ import main as convert
from convert.base import run_base, run_weights, weights_hash
from convert.to_flax import read_folder
from convert.to_torch import write_model
from jaxllm.config import LoraConfig, ModelConfig, TrainConfig
from jaxllm.config.families import read_config
from jaxllm.data.tokenizer import train_tokenizer
from jaxllm.errors import UserError
from jaxllm.evaluate import main as evaluate
from jaxllm.files import read_json, write_json
from jaxllm.generate import load_model
from jaxllm.model import adapters
from jaxllm.model.batch import TokenBatch
from jaxllm.model.decoder import abstract_adapted, model_facts
from jaxllm.model.kernels import grouped_adapted, grouped_loop, grouped_triton
from jaxllm.model.kernels.interface import ExpertKernels, ExpertRows, Saved
from jaxllm.model.layout import ONE_DEVICE
from jaxllm.plan.hlo import read_program
from jaxllm.plan.hlo_cost import matrix_products
from jaxllm.run.arguments import parse_args
from jaxllm.run.reporting import announce_adapters
from jaxllm.store.adapter_folder import adapter_options
from jaxllm.store.checkpoint import CheckpointReader, Weights
from jaxllm.store.folder import read_config as read_run
from jaxllm.train.computation import Computation
from jaxllm.train.optim import StepNumbers
from jaxllm.train.placement import choose_placement, compile_programs, lower_step
from jaxllm.train.step import merged
from jaxllm.train.trainer import Trainer
from parity_tests.deepseek_cases import V2, V3
from tests.configs import open_files
from tests.test_families import assert_same_bits, tensors_of, write_tensors

EVERYWHERE = "attention,shared,dense,experts"
SOURCE = V3 | {
    "vocab_size": 300, "num_hidden_layers": 2, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "bfloat16",
}  # fmt: skip


def random(shapes: Any, size: float, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: size * rng.standard_normal(leaf.shape, np.float32), shapes)


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory) -> Path:
    """A folder of the DeepSeek family in bfloat16, with a tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "model"
    config = read_config(SOURCE)
    shapes = abstract_adapted(config, LoraConfig(rank=1))
    weights = Weights(random(shapes.frozen, 0.1), random(shapes.routing_bias, 0.1))
    write_model(config, weights, folder, "bfloat16", SOURCE)
    train_tokenizer(open_files(corpus), 290).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def options(base, corpus) -> list[str]:
    made = ["--init", str(base), "--data", str(corpus), "--lora-rank", "4", "--lora-alpha", "12"]
    made += ["--lora-targets", EVERYWHERE, "--seq-len", "16", "--batch-size", "4", "--warmup-steps", "1"]
    made += ["--learning-rate", "1e-2", "--steps", "4", "--save-every", "2", "--eval-every", "4", "--eval-samples", "3"]
    return [*made, "--keep-checkpoints", "5", "--sample-tokens", "4", "--temperature", "0", "--precision", "float32"]


@pytest.fixture(scope="module")
def run(options, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lora"
    assert train.main([*options, "--run-dir", str(folder)]) == 0
    return folder


def saved_adapters(run: Path, step: int) -> Any:
    config = read_run(run, TrainConfig)
    return CheckpointReader(run, step).adapters(config.model, config.lora).params


def test_a_checkpoint_holds_adapters_alone(run, base):
    """And names the base by its hash."""
    state = Computation.of(read_run(run, TrainConfig)).state
    item = epath.Path(run / "checkpoints" / "4" / "weights")
    written = jax.tree.leaves(
        dict(ocp.StandardCheckpointHandler().metadata(item)), is_leaf=lambda x: hasattr(x, "shape")
    )
    wanted = jax.tree.leaves((state.params, state.routing_bias))
    assert sorted(leaf.shape for leaf in written) == sorted(leaf.shape for leaf in wanted)
    assert all(leaf.any() for leaf in jax.tree.leaves(saved_adapters(run, 4)))  # B has learned
    assert json.loads((run / "checkpoints" / "4" / "checksums.json").read_text())["list"]["base"]
    assert read_json(run / "base.json") == {"sha256": weights_hash(base)}


def test_a_run_that_was_killed_resumes_to_the_same_bits(run, options, tmp_path):
    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    assert train.main([*options, "--run-dir", str(tmp_path / "again")]) == 0
    jax.tree.map(np.testing.assert_array_equal, saved_adapters(run, 4), saved_adapters(tmp_path / "again", 4))


def test_another_base_is_refused_in_one_line(run, base, options, tmp_path, capsys):
    """Also where the folder has the same name; the same weights elsewhere are taken."""
    shutil.copytree(base, tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    shutil.copytree(run, tmp_path / "run")
    assert train.main([*options, "--run-dir", str(tmp_path / "run"), "--init", str(tmp_path / "other")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(f"^error: init is .*other.* not those that the adapters .*{re.escape(str(base))}.* --init", line)
    shutil.copytree(base, tmp_path / "moved")
    (tmp_path / "moved" / "training_args.bin").write_bytes(b"of a trainer")  # not read
    assert train.main([*options, "--run-dir", str(tmp_path / "run"), "--init", str(tmp_path / "moved")]) == 0
    shutil.rmtree(tmp_path / "moved")
    capsys.readouterr()
    for main, given in ((train.main, ["--run-dir"]), (evaluate, [])):
        assert main([*given, str(tmp_path / "run")]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert re.search("init is .*moved.* there is nothing: put it back, .* --run-dir .*run --init FOLDER", line)


def test_merged_equals_the_adapter_beside_the_base(run, base):
    """The exported, generated and evaluated model, in float32."""
    config = read_run(run, TrainConfig)
    model, weights = read_folder(base)[:2]
    graph = abstract_adapted(model, config.lora).graph
    apart = merged(graph, saved_adapters(run, 4), weights.routing_bias, weights.params)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 290, (2, 12)))
    wanted = nnx.jit(lambda model, ids: model(ids))(apart, ids)
    found = nnx.jit(lambda model, ids: model(ids))(load_model(run), ids)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * float(jnp.abs(wanted).max()))
    assert not np.allclose(found, nnx.jit(lambda model, ids: model(ids))(load_model(base), ids), atol=1e-2)
    assert evaluate([str(run), "--seq-len", "16"]) == 0


def test_fp8_files_are_a_base_of_their_products_in_bfloat16(base, options, tmp_path, capsys):
    """A run on them equals one on a folder of these products bit for bit, and so does what is made of it."""
    plain, stored, rng = {}, {}, np.random.default_rng(0)
    for name, values in tensors_of(base).items():
        plain[name] = stored[name] = values
        if ".layers." in name and values.ndim == 2 and ".gate." not in name:
            scales = rng.uniform(0.01, 0.02, fp8.scale_shape(values.shape)).astype(np.float32)
            stored[name] = (values.astype(np.float32) / scales.mean()).astype(ml_dtypes.float8_e4m3fn)
            stored[name + fp8.SCALE_SUFFIX] = scales
            plain[name] = fp8.dequantize(stored[name], scales).astype(jnp.bfloat16)
    quantized = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    trained, exported = [], []
    for name, tensors, also in (("fp8", stored, quantized), ("plain", plain, {})):
        shutil.copytree(base, tmp_path / name)
        write_tensors(tmp_path / name, tensors)
        write_json(tmp_path / name / "config.json", read_json(base / "config.json") | also)
        run = tmp_path / f"run-{name}"
        assert train.main([*options, "--init", str(tmp_path / name), "--run-dir", str(run)]) == 0
        assert ("in float32 and held in bfloat16" in capsys.readouterr().err) == (name == "fp8")
        assert convert(["to-torch", str(run), str(tmp_path / f"merged-{name}"), "--merge"]) == 0
        trained.append(saved_adapters(run, 4))
        exported.append((tmp_path / f"merged-{name}" / "model.safetensors").read_bytes())
    assert_same_bits(*trained)
    assert exported[0] == exported[1]
    assert_same_bits(*(run_weights(tmp_path / f"run-{name}")[1] for name in ("fp8", "plain")))
    assert_same_bits(*(nnx.to_pure_dict(nnx.state(load_model(tmp_path / name))) for name in ("fp8", "plain")))


def test_an_adapter_goes_out_and_in(run, base, options, tmp_path, capsys):
    """Out for PEFT, merged, and in again as the start of another run."""
    assert convert(["to-torch", str(run), str(tmp_path / "out")]) == 0
    values = read_json(tmp_path / "out" / "adapter_config.json")
    assert (values["r"], values["lora_alpha"], values["base_model_name_or_path"]) == (4, 12, str(base))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert convert(["to-torch", str(run), str(tmp_path / "merged"), "--merge"]) == 0
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), run_weights(run)[1].params)
    jax.tree.map(
        np.testing.assert_array_equal, read_folder(tmp_path / "merged")[1].params, jax.tree.map(np.float32, rounded)
    )
    again = [*options, "--run-dir", str(tmp_path / "run"), "--learning-rate", "0", "--steps", "2", "--save-every", "1"]
    at = again.index("--lora-rank")  # rank, alpha and targets are the adapter's
    again[at : at + 6] = ["--adapter", str(tmp_path / "out")]
    assert train.main(again) == 0
    jax.tree.map(np.testing.assert_array_equal, saved_adapters(run, 4), saved_adapters(tmp_path / "run", 1))
    shutil.rmtree(tmp_path / "out")  # the checkpoints have the adapter now
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    assert train.main(["--run-dir", str(tmp_path / "run")]) == 0
    assert convert(["to-torch", str(run), str(tmp_path / "x"), "--dtype", "bfloat16"]) == 2
    assert "pass --merge" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--optimizer", "muon"], "optimizer is 'muon'.* pass --optimizer adamw"),
        (["--lora-targets", "attention,router"], "lora_targets is 'attention,router'"),
        (["--lora-rank", "0"], "lora_alpha is 12.0.* pass --lora-rank"),
        (["--adapter", "nowhere"], "adapter is 'nowhere'.* holds no adapter_config.json"),
    ],
)
def test_what_cannot_be_is_refused(options, tmp_path, capsys, given, said):
    assert train.main([*options, "--run-dir", str(tmp_path / "run"), *given]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(said, line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [{"alpha": 8.0}, {"targets": "experts"}, {"rslora": True}])
def test_options_of_an_adapter_need_a_rank(given):
    with pytest.raises(UserError, match=f"lora_{next(iter(given))} is .* pass --lora-rank"):
        LoraConfig(**given)


def test_an_adapter_that_changed_its_base_is_refused_and_dropout_is_said(run, tmp_path, capsys):
    assert convert(["to-torch", str(run), str(tmp_path / "out")]) == 0
    file = tmp_path / "out" / "adapter_config.json"
    values = read_json(file)
    file.write_text(json.dumps(values | {"lora_dropout": 0.1}))
    assert adapter_options(file.parent)["lora_rank"] == 4
    assert "lora_dropout is 0.1" in capsys.readouterr().err
    file.write_text(json.dumps(values | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(UserError, match="init_lora_weights is 'pissa_niter_4'"):
        adapter_options(file.parent)


def test_an_adapter_a_run_and_a_model_are_not_taken_for_one_another(run, tmp_path, capsys):
    with pytest.raises(UserError, match=f"that is a run; .* to-torch {run} OUT"):
        adapter_options(run)
    assert convert(["to-torch", str(run), str(tmp_path / "out")]) == 0
    with pytest.raises(UserError, match=r"holds an adapter without its model: .* --adapter, beside --init"):
        load_model(tmp_path / "out")
    for source in ("out", "out/adapter_model.safetensors"):
        assert convert(["to-flax", str(tmp_path / source), str(tmp_path / "made")]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert re.search(r"or what .*merge_and_unload\(\)", line)


def test_adapters_learn_faster_than_weights(base, run, capsys):
    """By default, and a message reports it; a resumed run keeps its own."""

    def rate(*given: str) -> tuple[float, int]:
        config = parse_args(["--init", str(base), *given], "train.py", None, TrainConfig)
        return config.optim.learning_rate, config.schedule.warmup_steps

    assert rate("--lora-rank", "4") == (2e-4, 20)
    assert rate("--lora-rank=4", "--learning-rate", "1e-3") == (1e-3, 20)
    assert rate() == rate("--lora-rank", "0") == (2e-5, 50)
    assert rate("--lora-rank", "4", "--run-dir", str(run)) == (1e-2, 1)
    announce_adapters(LoraConfig(rank=4), 1e-2, 1, trained=10)
    assert "with --learning-rate 0.01 and --warmup-steps 1;" in capsys.readouterr().out


def test_an_adapter_of_a_model_of_the_hub_names_its_repository(run, tmp_path):
    """And no folder of this machine."""
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "train_config.json"
    snapshot = tmp_path / "models--moonshotai--Moonlight-16B-A3B" / "snapshots" / "930e8e3"
    write_json(file, read_json(file) | {"init": str(snapshot)})
    assert convert(["to-torch", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    values, card = read_json(tmp_path / "out" / "adapter_config.json"), (tmp_path / "out" / "README.md").read_text()
    assert (values["base_model_name_or_path"], values["revision"]) == ("moonshotai/Moonlight-16B-A3B", "930e8e3")
    assert "\nbase_model: moonshotai/Moonlight-16B-A3B\n" in card
    assert str(tmp_path) not in card + json.dumps(values)


def test_adapters_need_weights(tmp_path, capsys):
    """Also where the recipe's optimizer would be refused."""
    for optimizer in ([], ["--optimizer", "adamw"]):
        assert train.main(["--lora-rank", "4", *optimizer, "--run-dir", str(tmp_path / "run")]) == 2
        assert "pass --init" in capsys.readouterr().err


def test_a_run_without_adapters_does_not_get_them(base, corpus, tmp_path, capsys):
    config = TrainConfig.from_options(model=read_config(SOURCE), init=base, data=str(corpus), seq_len=16)
    run = tmp_path / "run"
    (run / "checkpoints" / "4").mkdir(parents=True)
    write_json(run / "config.json", config.model.to_dict())
    write_json(run / "train_config.json", config.to_dict())
    assert train.main(["--run-dir", str(run), "--lora-rank", "4"]) == 2
    assert re.search("the run in .*run trains all weights: leave the option out", capsys.readouterr().err)


def test_a_model_without_the_matrices_is_refused():
    with pytest.raises(UserError, match="has none of them"):
        abstract_adapted(ModelConfig(64, 32, 1, 2, 24), LoraConfig(rank=2, targets="dense"))


# what a step computes and holds


def config_of(source: dict[str, Any], lora: dict[str, Any], **options: Any) -> TrainConfig:
    return TrainConfig.from_options(model=read_config(source), batch_size=2, seq_len=32, **options, **lora)


ADAPTED = {"lora_rank": 2, "lora_targets": EVERYWHERE, "lora_base_dtype": "float32"}


@functools.cache
def compiled(name: str, adapted: bool) -> Any:
    sources = {
        "dense": V3 | {"vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024, "first_k_dense_replace": 3,
                       "kv_lora_rank": 256, "q_lora_rank": 384, "v_head_dim": 128, "qk_nope_head_dim": 128},
        # no size is that of a block of rows
        "experts": V3 | {"hidden_size": 60, "moe_intermediate_size": 28, "n_routed_experts": 12, "q_lora_rank": 36,
                         "intermediate_size": 76},
    }  # fmt: skip
    config = config_of(sources[name], ADAPTED if adapted else {})
    return config, lower_step(Computation.of(config), ONE_DEVICE).compile()


def test_a_step_computes_two_thirds_of_a_full_one():
    """Read in the compiled program: 0.70 of the FLOPs at most."""
    adapted, full = (
        sum(product.flops for product in matrix_products(read_program(compiled("dense", kind)[1].as_text())))
        for kind in (True, False)
    )
    assert 0.5 * full < adapted < 0.7 * full


def gradient_shapes(name: str, adapted: bool) -> set[tuple[int, ...]]:
    """Shapes of products in the program that are those of a matrix of the model."""
    config, program = compiled(name, adapted)
    shapes = Computation.of(dataclasses.replace(config, lora=LoraConfig())).state.params
    facts = model_facts(config.model)[0]
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(facts), strict=True)
    matrices = {leaf.shape[-2:] for leaf, known in leaves if known.decays}
    D, M = config.model.hidden_size, config.model.moe_intermediate_size
    matrices |= {(D, 2 * M)}  # gate and up of an expert, side by side
    products = re.findall(r"= \w+\[([\d,]*)\][^=]* dot\(", program.as_text())
    found = {tuple(map(int, filter(None, shape.split(","))))[-2:] for shape in products}
    return found & (matrices | {shape[::-1] for shape in matrices})


@pytest.mark.slow
def test_no_product_is_the_gradient_of_a_frozen_weight():
    assert gradient_shapes("experts", adapted=True) == set()
    assert len(gradient_shapes("experts", adapted=False)) > 8  # it finds them in a full step


def test_memory_is_the_base_and_16_bytes_an_adapter_parameter():
    """Arguments are the base and 12 bytes (master, two moments); the other 4 are the gradient, a temporary."""
    config, program = compiled("dense", adapted=True)
    state, memory = Computation.of(config).state, program.memory_analysis()
    base, adapters = nbytes(state.frozen), nbytes(state.params)
    small = 64 * 1024  # labels, step, key
    assert base + 3 * adapters <= memory.argument_size_in_bytes < base + 3 * adapters + small
    assert memory.alias_size_in_bytes > base  # the base is in place, not copied
    _, full = compiled("dense", adapted=False)
    assert memory.temp_size_in_bytes < full.memory_analysis().temp_size_in_bytes - base + adapters
    half = Computation.of(config.with_options(lora_base_dtype="bfloat16")).state
    assert nbytes(half.frozen) < 0.51 * base


@pytest.mark.slow
def test_adapters_are_merged_in_the_place_of_the_base():
    """At the end of a run, which has no room for both."""
    trainer = Trainer(config_of(V3, ADAPTED | {"lora_base_dtype": "bfloat16"}))
    state = trainer.init()
    wanted = jax.tree.map(np.array, state.frozen)  # copies; B is zero
    params, _ = trainer.weights(state)
    for before, after in zip(jax.tree.leaves(state.frozen), jax.tree.leaves(params), strict=True):
        assert before.is_deleted() or before.unsafe_buffer_pointer() == after.unsafe_buffer_pointer()
    jax.tree.map(np.testing.assert_array_equal, params, wanted)
    shapes = [jax.ShapeDtypeStruct((16, *shape), jnp.float32) for shape in ((64, 96), (64, 2), (2, 96))]
    memory = adapters._add_product.lower(*shapes, 2.0).compile().memory_analysis()
    whole = nbytes(shapes[0])
    assert (memory.alias_size_in_bytes, memory.temp_size_in_bytes < whole / 4) == (whole, True)


def test_a_base_is_free_where_the_merged_matrix_has_another_dtype(run, monkeypatch):
    """As in an export: then it cannot take the base's place."""
    held, counts, add = [], [], adapters._add_product

    def watched(*args: Any) -> Any:
        counts.append(sum(not leaf.is_deleted() for leaf in held))
        return add(*args)

    def read(*args: Any) -> Any:
        weights = run_base(*args)
        held.extend(jax.tree.leaves(weights))
        return weights

    monkeypatch.setattr(adapters, "_add_product", watched)
    monkeypatch.setattr("convert.base.run_base", read)
    run_weights(run)
    assert counts == [len(held) - i for i in range(len(counts))]
    assert len(counts) > 20


def nbytes(shapes: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"mesh": "data=2,fsdp=2,expert=2"}, {"parallel": "pmap"}])
def test_layouts_train_the_same(layout):
    """float32: sums in another order."""
    source = V2 | {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}
    config = config_of(source, ADAPTED, steps=8, warmup_steps=1).with_options(batch_size=8, seq_len=8)
    rows = np.random.default_rng(0).integers(0, 97, (3, 1, 8, 8), np.int32)

    def trained(**options: Any) -> Any:
        changed = config.with_options(**options)
        placement, computation = choose_placement(changed.mesh, 8), Computation.of(changed)
        state = jax.tree.map(np.asarray, start())
        programs = compile_programs(placement, computation)
        state = placement.shard(jax.device_put(state, placement.state_shardings(computation)))
        losses = []
        for batch in rows:
            state, metrics = programs.step(state, TokenBatch(batch), StepNumbers.of(changed.optim, changed.schedule))
            losses.append(float(metrics.loss))
        losses.append(float(programs.evaluate(state, TokenBatch(rows[0, 0]))[0]))
        return losses, jax.tree.map(np.asarray, placement.unshard(state).params)

    @functools.cache
    def start() -> Any:
        state = jax.jit(Computation.of(config).init_state)()
        return state._replace(params=random(state.params, 0.1), frozen=random(state.frozen, 0.1))

    (losses, params), (others, spread) = trained(), trained(**layout)
    np.testing.assert_allclose(losses, others, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-4 * np.abs(a).max()), params, spread)


# kernels


@pytest.mark.slow
@pytest.mark.parametrize("rank", [4, 16])
def test_the_triton_kernels_with_adapters_equal_the_loops(monkeypatch, rank):
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    sizes, (N, D, F) = (0, 130, 1, 60), (95, 32, 48)
    M, keys = sum(sizes), iter(jax.random.split(jax.random.key(0), 20))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.float32)

    x, d_out, tokens = normal(N, D), normal(N, D), jax.random.randint(next(keys), (M,), 0, N)
    weights = tuple(normal(12, *shape) for shape in ((D, F), (D, F), (F, D)))
    adapters = tuple((0.2 * normal(4, i, rank), 0.2 * normal(4, rank, o)) for i, o in ((D, F), (D, F), (F, D)))
    row_weights, counts = jnp.abs(normal(M, 1)), jnp.asarray(sizes)

    def results(kernels: ExpertKernels) -> list[np.ndarray]:
        def pad(a):
            return jnp.pad(a, ((0, kernels.padding(M)), *[(0, 0)] * (a.ndim - 1)))

        rows = ExpertRows(x, pad(tokens), pad(row_weights), counts, weights, jnp.asarray(4), adapters)
        room = Saved(jnp.zeros_like(kernels.new_saved(3, M, 2 * F, x.dtype)), jnp.asarray(1))
        out, saved = kernels.ffn(rows, room)
        totals = jax.tree.map(kernels.new_gradient, adapters)
        d_rows, d_row_weights, gradients = kernels.ffn_gradients(rows, d_out, Saved(saved, jnp.asarray(1)), totals)
        made = [out[:M], d_rows[:M], d_row_weights[:M], saved[1, :M], *jax.tree.leaves(gradients)]
        return [np.asarray(a, np.float64) for a in made]

    for ours, theirs in zip(results(grouped_adapted.KERNELS), results(grouped_loop.KERNELS), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())
    assert grouped_adapted.KERNELS != grouped_triton.KERNELS
