"""Planning for a device that you do not have: targets, the reader of programs, arithmetic, and real compilations."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxllm.config import PRESETS, TrainConfig
from jaxllm.devices import FOLDER, load_target, target_names
from jaxllm.errors import UserError
from jaxllm.model.flops import parameters, training_flops_per_token
from jaxllm.plan import estimate as planning
from jaxllm.plan.__main__ import held_dtype, main
from jaxllm.plan.estimate import Plan, Refused, compile_plan, largest_batch, read_plan
from jaxllm.plan.hlo import Shape, read_program, read_shapes
from jaxllm.plan.hlo_cost import Collective, Kernel, collectives, kernels, matrix_products
from jaxllm.plan.hlo_grouped import grouped_bytes, grouped_flops
from jaxllm.plan.report import plan_as_json, print_plan, print_search
from jaxllm.plan.roofline import ACHIEVED_FLOPS, ACHIEVED_INTERCONNECT, ACHIEVED_MEMORY, roofline
from jaxllm.run.throughput import GIB
from jaxllm.train.computation import Computation

needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax[cuda13]: pip install -e '.[cuda13,test]'"
)
H100 = load_target("h100")
CONFIG = TrainConfig.from_options(
    preset="customllm-1b", model=PRESETS["customllm-1b"], seq_len=2048, precision="bfloat16"
)


# Targets


@pytest.mark.parametrize("name", target_names())
def test_a_target_agrees_with_its_description_for_xla(name):
    target = load_target(name)
    assert target.peak_tflops["bfloat16"] >= target.peak_tflops["float32"]
    if target.config is not None:
        (name,) = re.findall(r'device_description_str: "([^"]*)"', target.config)
        assert name in target.device_kinds
        described = {key: float(value) for key, value in re.findall(r"(\w+): ([\d.]+)", target.config)}
        assert described["device_memory_size"] / GIB == pytest.approx(target.memory_gib, abs=0.02)
        assert described["memory_bandwidth"] / 1e9 == pytest.approx(target.memory_gb_per_s, rel=1e-3)
        assert target.compute_capability >= 8


def test_a_device_kind_names_one_target():
    kinds = [kind for name in target_names() for kind in load_target(name).device_kinds]
    assert len(kinds) == len({*kinds}) >= len(target_names())
    assert all(load_target(name).device_kinds for name in target_names())


def test_every_description_belongs_to_a_target():
    named = {json.loads(file.read_text()).get("config") for file in FOLDER.glob("*.json")}
    assert named - {None} == {file.name for file in FOLDER.glob("*.txtpb")}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"memory_gib": None}, ["memory_gib is missing"]),
        ({"memory_gib": -1}, ["memory_gib is -1", "larger than 0"]),
        ({"memory_gib": "much"}, ["memory_gib is 'much'"]),
        ({"peak_tflops": {"bfloat16": 1}}, ["peak_tflops", "float32 and bfloat16"]),
        ({"peak_tflops": {"bfloat16": 1, "float32": 0}}, ["peak_tflops.float32 is 0"]),
        ({"platform": "metal"}, ["platform is 'metal'", "cuda, rocm, tpu"]),
        ({"config": 1}, ["config is 1", "text"]),
        ({"device_kinds": "NVIDIA H100"}, ["device_kinds is 'NVIDIA H100'", "list of names"]),
        ({"config": "none.txtpb"}, ["none.txtpb", "cannot be read"]),
        ({"sources": {}}, ["sources.memory_gib is missing"]),
        ({"devices": 0.5}, ["devices is 0.5", "whole number"]),
        ({"color": "green"}, ["color is not a field"]),
    ],
)
def test_a_custom_target_is_checked(change, parts, tmp_path):
    values = json.loads((FOLDER / "h100.json").read_text())
    values["config"] = str(FOLDER / values["config"])
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(values))
    assert load_target(str(file)) == H100
    file.write_text(json.dumps({key: value for key, value in (values | change).items() if value is not None}))
    with pytest.raises(UserError) as refused:
        load_target(str(file))
    for part in ["mine.json", *parts]:
        assert part in str(refused.value)


# Bad input


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--target", "h101"], ["target is 'h101'", "h100", "tpu-v5e"]),
        (["--target", "no/such.json"], ["no/such.json"]),
        (["--target", "mi300x"], ["target is 'mi300x'", "data sheet is known"]),
        (["--preset", "huge"], ["preset is 'huge'", "customllm-1b"]),
        (["--preset", "customllm-1b", "--init", "x"], ["preset is 'customllm-1b'", "leave out one of the two"]),
        (["--batch-size", "0"], ["batch_size is 0"]),
        (["--seq-len", "4096"], ["seq_len is 4096", "2048"]),
        (["--grad-accum", "0"], ["grad_accum is 0"]),
        (["--devices", "0"], ["devices is 0"]),
        (["--devices", "4", "--mesh", "fsdp=8"], ["devices is 4", "'fsdp=8' has 8"]),
        (["--mesh", "fsdp=3"], ["mesh is 'fsdp=3'", "batch_size = 8"]),
        (["--mesh", "data=16", "--batch", "16"], ["its 16 devices are more than the 8 of a node"]),
        (["--tokens", "0"], ["tokens is 0"]),
        (["--json", "no/such/folder.json"], ["json is no/such/folder.json", "no folder"]),
        (["--json", "/"], ["json is /", "name a file"]),
    ],
)
def test_bad_options_are_refused_before_anything_is_compiled(options, parts, capsys, monkeypatch):
    monkeypatch.setattr(planning, "compile_plan", None)
    assert main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    for part in parts:
        assert part in error


@pytest.mark.parametrize(
    ("target", "remedy"), [("h100", "pip install 'jax[cuda13]'"), ("tpu-v5e", "pip install 'jax[tpu]'")]
)
def test_a_missing_extra_is_named(target, remedy, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(planning, "compile_plan", None)
    assert main(["--target", target]) == 2
    assert remedy in capsys.readouterr().err


def test_a_compiler_s_failure_is_one_line(monkeypatch):
    def run(command, env, **_):
        assert env["JAX_PLATFORMS"] == "cpu"
        assert env["CUDA_VISIBLE_DEVICES"] == ""
        return subprocess.CompletedProcess(
            command, 1, "", "W0000 noise\nTraceback:\n  File\nRuntimeError: no such unit\n\n"
        )

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match=r"^NVIDIA H100.* could not be compiled: RuntimeError: no such unit$"):
        compile_plan(CONFIG, H100)


# The reader of compiled programs


def test_shapes_are_read_with_their_bytes_and_their_place():
    text = "(f32[2,3]{1,0}, bf16[8]{0:T(8,128)(2,1)S(1)}, /*index=2*/s4[3]{0}, pred[], f8e4m3fn[5]{0}, token[])"
    shapes = read_shapes(text)
    assert [shape.bytes for shape in shapes] == [24, 16, 1.5, 1, 5, 0]
    assert shapes[1] == Shape("bf16", (8,), on_chip=True)


def test_products_of_a_compiled_scan_count_every_turn():
    def many(x, weights):
        return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0].sum()

    x, weights = jax.ShapeDtypeStruct((64, 48), jnp.float32), jax.ShapeDtypeStruct((7, 48, 48), jnp.float32)
    program = read_program(jax.jit(many).lower(x, weights).compile().as_text())
    assert sum(product.flops for product in matrix_products(program)) == 7 * 2 * 64 * 48 * 48
    assert program.unknown_loops() == 0
    assert not collectives(program)


EXCHANGE = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np

if sys.argv[1] == "cpu":
    devices = jax.devices()
else:
    from jax.experimental import topologies
    options = {"topology": "1x1x8", "target_config": Path(sys.argv[1]).read_text()}
    devices = topologies.get_topology_desc(platform="cuda", topology_name="gpu", **options).devices
mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 4), ("data", "fsdp"))
P = jax.sharding.PartitionSpec

def body(x, _):
    total = jax.lax.psum(x, "data")
    gathered = jax.lax.all_gather(x, "fsdp", tiled=True)
    mine = jax.lax.psum_scatter(gathered * total.sum(), "fsdp", tiled=True)
    swapped = jax.lax.all_to_all(mine, "fsdp", 0, 0, tiled=True)
    return jnp.sin(jax.lax.ppermute(swapped, "data", [(0, 1), (1, 0)])), None

rows = P(("data", "fsdp"))
step = jax.shard_map(lambda x: jax.lax.scan(body, x, length=5)[0], mesh=mesh, in_specs=rows, out_specs=rows)
x = jax.ShapeDtypeStruct((8 * 64, 256), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, rows))
print(jax.jit(step).lower(x).compile().as_text())
"""


@pytest.mark.parametrize(
    "where",
    ["cpu", pytest.param(str(FOLDER / "h100_sxm.txtpb"), marks=[pytest.mark.gpu_compile, needs_cuda], id="cuda")],
)
def test_collectives_of_a_compiled_program_on_eight_devices(where):
    """On a GPU each is a pair of instructions, on the CPU one."""
    environment = os.environ | planning.ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-c", EXCHANGE, where]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    program = read_program(text[text.index("HloModule") :])
    assert program.devices == 8
    held = 64 * 256 * 4
    assert sorted(collectives(program)) == [
        Collective("all-gather", 5, 5 * held * 3),
        Collective("all-reduce", 5, 5 * held * 2 / 2),
        Collective("all-to-all", 5, 5 * held * 3 / 4),
        Collective("collective-permute", 5, 5 * held),
        Collective("reduce-scatter", 5, 5 * 4 * held * 3 / 4),
    ]


def program_of(*lines: str, before: str = "", header: str = ""):
    body = "\n".join(f"  {line}" for line in lines)
    return read_program(f"HloModule made{header}\n\n{before}\nENTRY %main (p: f32[]) -> f32[] {{\n{body}\n}}\n")


@pytest.mark.parametrize(
    ("groups", "sent"),
    [
        ("{{0,1},{2,3}}", 1.0),
        ("[2,2]<=[4]", 1.0),
        ("[2,2]<=[2,2]T(1,0)", 1.0),
        ("{}", 1.5),
        ("{{0},{1},{2},{3}}", None),
        ("mesh['a'=2,'b'=2] {'b'}", 1.0),
        ("mesh['a'=2,'b'=2] {'a','b'}", 1.5),
        ("mesh['a'=4] {'a':(2)2}", 1.0),
    ],
)
def test_groups_of_a_collective(groups, sent):
    program = program_of(
        "%p = f32[250]{0} parameter(0)",
        f"%all-reduce-start = f32[250]{{0}} all-reduce-start(%p), replica_groups={groups}, to_apply=%add",
        "ROOT %all-reduce-done = f32[250]{0} all-reduce-done(%all-reduce-start)",
        header=", num_partitions=4",
    )
    assert collectives(program) == ([] if sent is None else [Collective("all-reduce", 1, 1000 * sent)])


@pytest.mark.parametrize("gathers", [False, True], ids=["sorted rows", "rows of tokens"])
def test_a_grouped_kernel_reads_a_token_for_each_of_its_rows(gathers):
    """N=256 tokens, M=512 rows, D=32, F=48, E=2 of a stack of S=6 experts; tiles of 128 rows, one more a group."""
    rows = 256 if gathers else 512
    operands = ["s32[6]{0}", "s32[6]{0}", "s32[6]{0}", "s32[1]{0}", "f32[512,1]{1,0}"]
    operands += [*["s32[512]{0}"] * gathers, f"bf16[{rows},32]{{1,0}}", *["bf16[6,32,48]{2,1,0}"] * 2]
    product = [f"%a.{i} = {shape} parameter({i})" for i, shape in enumerate(operands)]
    names = ", ".join(f"%a.{i}" for i in range(len(operands)))
    call = 'custom-call({}), custom_call_target="__gpu$xla.gpu.triton", metadata={{op_name="x/{}/pallas_call"}}'
    program = program_of(*product, f"ROOT %k = bf16[512,48]{{1,0}} {call.format(names, 'grouped_product_swiglu')}")
    (kernel,) = [step.instruction for step in program.steps() if step.instruction.name == "k"]
    weights, index = 2 * 2 * 32 * 48 * 2, 4 * 512 * gathers
    assert grouped_bytes(kernel) == 3 * 24 + 4 + 4 * 512 + index + 2 * 512 * 32 + weights + 2 * 512 * 48
    assert grouped_flops(kernel) == 2 * 2 * (512 + 2 * 128) * 32 * 48

    operands = ["s32[2]{0}", "s32[2]{0}", "s32[1]{0}", *["s32[512]{0}"] * gathers, f"bf16[{rows},32]{{1,0}}"]
    operands += ["bf16[512,96]{1,0}", *["f32[6,32,48]{2,1,0}"] * 2]
    gradient = [f"%a.{i} = {shape} parameter({i})" for i, shape in enumerate(operands)]
    names, last = ", ".join(f"%a.{i}" for i in range(len(operands))), len(operands) - 1
    aliases = f"output_to_operand_aliasing={{{{0}}: ({last - 1}, {{}}), {{1}}: ({last}, {{}})}}"
    result = "(f32[6,32,48]{2,1,0}, f32[6,32,48]{2,1,0})"
    program = program_of(*gradient, f"ROOT %k = {result} {call.format(names, 'grouped_weight_gradient')}, {aliases}")
    (kernel,) = [step.instruction for step in program.steps() if step.instruction.name == "k"]
    assert grouped_bytes(kernel) == 2 * 8 + 4 + index + 2 * 512 * (32 + 96) + 4 * 2 * 2 * 32 * 48
    assert grouped_flops(kernel) == 2 * (512 + 2 * 128) * 32 * 96


def test_collectives_in_an_asynchronous_computation_count_once():
    inner = "%wrapped (q: f32[8]) -> f32[4] {\n  %q = f32[8]{0} parameter(0)\n"
    inner += "  ROOT %rs = f32[4]{0} reduce-scatter(%q), replica_groups={{0,1}}, dimensions={0}, to_apply=%add\n}\n"
    program = program_of(
        "%p = f32[8]{0} parameter(0)",
        "%start = ((f32[8]{0}), f32[4]{0}, s32[]) async-start(%p), calls=%wrapped",
        "ROOT %done = f32[4]{0} async-done(%start), calls=%wrapped",
        before=inner,
    )
    assert collectives(program) == [Collective("reduce-scatter", 1, 16)]


def test_a_tpu_s_chain_of_kernels_is_one_collective():
    gather = 'all-gather(%q), channel_id=2, replica_groups={{0,1}}, frontend_attributes={chain_id="0"}'
    kernel = (
        "%part.{n} (q: f32[8]) -> f32[16] {{\n  %q = f32[8]{{0}} parameter(0)\n  ROOT %g = f32[16]{{0}} {gather}\n}}\n"
    )
    inner = "".join(kernel.format(n=n, gather=gather) for n in range(3))
    inner += "%all-reduce-scatter.1 (q: f32[16]) -> f32[8] {\n  %whole = f32[16]{0} parameter(0)\n"
    inner += "  %sum = f32[16]{0} all-reduce(%whole), channel_id=3, replica_groups={{0,1}}, to_apply=%add\n"
    inner += "  ROOT %mine = f32[8]{0} slice(%sum), slice={[0:8]}\n}\n"
    program = program_of(
        "%p = f32[8]{0} parameter(0)",
        *(f"%f.{n} = f32[16]{{0}} fusion(%p), kind=kCustom, calls=%part.{n}" for n in range(3)),
        "ROOT %s = f32[8]{0} fusion(%f.2), kind=kCustom, calls=%all-reduce-scatter.1",
        before=inner,
    )
    assert collectives(program) == [Collective("all-gather", 1, 32), Collective("reduce-scatter", 1, 32)]


def test_products_of_libraries():
    gemm = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs":["0"]}}}'
    scores = '"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "128", "128"]}'
    query = "bf16[2,128,4,64]{3,2,1,0}"
    program = program_of(
        "%a = f32[32,16]{1,0} parameter(0)",
        "%b = f32[16,8]{1,0} parameter(1)",
        f'%g = (f32[32,8]{{1,0}}, s8[64]{{0}}) custom-call(%a, %b), custom_call_target="__cublas$gemm", '
        f"backend_config={gemm}",
        f"%q = {query} parameter(2)",
        f"%f = (bf16[2,4,128,64]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %q, %q), "
        f'custom_call_target="__cudnn$fmhaSoftmax", backend_config={{{scores}, "mask_type": "CAUSAL"}}',
        "ROOT %t = () tuple()",
    )
    products = {product.kernel: product.flops for product in matrix_products(program)}
    assert products == {
        "cuBLAS product": 2 * 32 * 16 * 8,
        "cuDNN fused attention, forward": 2 * (2 * 2 * 4 * 128 * 128 * 64) / 2,
    }


def test_a_tpu_convolution_counts_products_without_holes():
    """A batch of 16 becomes a dilated dimension, in which one place in 16 holds a number."""
    program = program_of(
        "%a = bf16[16,128,64]{2,1,0:T(8,128)(2,1)} parameter(0)",
        "%b = bf16[16,256,64]{2,1,0:T(8,128)(2,1)} parameter(1)",
        "ROOT %c = f32[16,128,256]{2,1,0:T(8,128)} convolution(%a, %b), window={size=16 stride=15 lhs_dilate=16}, "
        "dim_labels=0bf_0oi->0bf",
    )
    (product,) = matrix_products(program)
    assert product.flops == 2 * 16 * 128 * 256 * 64


COUNTED = """
%body (t: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {{
  %t = (s32[], f32[4,4]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[4,4]{{1,0}} get-tuple-element(%t), index=1
  %y = f32[4,4]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %out = (s32[], f32[4,4]{{1,0}}) tuple(%i, %y)
}}

%condition (t.1: (s32[], f32[4,4])) -> pred[] {{
  %t.1 = (s32[], f32[4,4]{{1,0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %limit = s32[] {limit}
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}}
"""


@pytest.mark.parametrize(
    ("limit", "note", "trips"),
    [
        ("constant(6)", "", 6),
        ("get-tuple-element(%t.1), index=0", "", 0),
        ("parameter(1)", "", None),
        ("parameter(1)", 'backend_config={"known_trip_count":{"n":"3"}}', 3),
    ],
)
def test_trip_counts_of_a_loop(limit, note, trips):
    program = program_of(
        "%zero = s32[] constant(0)",
        "%x.0 = f32[4,4]{1,0} parameter(0)",
        "%start = (s32[], f32[4,4]{1,0}) tuple(%zero, %x.0)",
        f"ROOT %loop = (s32[], f32[4,4]{{1,0}}) while(%start), condition=%condition, body=%body, {note}",
        before=COUNTED.format(limit=limit),
    )
    assert program.unknown_loops() == (trips is None)
    assert sum(product.flops for product in matrix_products(program)) == (trips or 0) * 2 * 4**3


def test_a_slice_of_a_stack_counts_as_a_slice():
    fused = """
%fused (stack: f32[24,100], row: f32[100], at: s32[]) -> f32[24,100] {
  %stack = f32[24,100]{1,0} parameter(0)
  %row = f32[100]{0} parameter(1)
  %at = s32[] parameter(2)
  %flat = f32[1,100]{1,0} bitcast(%row)
  ROOT %updated = f32[24,100]{1,0} dynamic-update-slice(%stack, %flat, %at, %at)
}
"""
    program = program_of(
        "%s = f32[24,100]{1,0} parameter(0)",
        "%r = f32[100]{0} parameter(1)",
        "%n = s32[] parameter(2)",
        "ROOT %f = f32[24,100]{1,0} fusion(%s, %r, %n), kind=kLoop, calls=%fused",
        before=fused,
    )
    assert kernels(program) == [Kernel(None, 0.0, 400 + 400 + 4)]


# Arithmetic


def test_the_roofline_by_hand():
    work = [
        Kernel(
            "dot", ACHIEVED_FLOPS["dot"] * 989.4e12, 0.5 * ACHIEVED_MEMORY * 3352e9
        ),  # 1 s of products, 0.5 of memory
        Kernel("grouped", 2 * ACHIEVED_FLOPS["grouped"] * 989.4e12, 0.0),  # 2 s
        Kernel(None, 0.0, 3 * ACHIEVED_MEMORY * 3352e9),  # 3 s
    ]
    found = roofline(H100, "bfloat16", work, [Collective("all-gather", 1, 0.25 * ACHIEVED_INTERCONNECT * 450e9)])
    assert (found.compute, found.memory, found.collectives) == pytest.approx((3, 3.5, 0.25))
    assert (found.bound_by, found.at_best) == ("memory", found.memory)
    assert found.expected == pytest.approx(1 + 2 + 3 + 0.25)
    assert roofline(H100, "float32", work[:1], []).compute == pytest.approx(2)


def a_plan(config: TrainConfig = CONFIG, gib: float = 18.0, **changes) -> Plan | Refused:
    per_second = ACHIEVED_FLOPS["dot"] * 989.4e12
    reply = {
        "compile_seconds": 1.0,
        "jax": jax.__version__,
        "memory": {"arguments": round(gib * GIB), "temporaries": 0, "outputs": 0, "program": 0},
        "products": [["dot.1", "XLA Triton product", "dot", 2 * per_second, 3, [[1]]]],
        "kernels": [["dot", 2 * per_second, 1e9]],
        "collectives": [["all-gather", 5, 3e9]],
        "unknown_loops": 0,
    }
    return read_plan(config, H100, json.loads(json.dumps(reply | changes)))


def test_a_plan_has_time_speed_and_whether_it_fits(capsys):
    plan = a_plan()
    assert plan.roofline.compute == pytest.approx(2)
    assert plan.mfu(2.0, "full") == pytest.approx(
        8 * 2048 * training_flops_per_token(CONFIG.model, 2048, "full") / 2 / 989.4e12
    )
    answer = json.loads(json.dumps(plan_as_json(plan, 10 * 8 * 2048)))
    assert answer["fits"]
    assert answer["run"]["seconds_at_best"] == pytest.approx(20)
    assert answer["collectives"] == {"all-gather": {"calls": 5, "bytes": 3e9}}
    assert not a_plan(gib=73).fits  # 0.92 of 79.14
    print_plan(plan, 10 * 8 * 2048, "a run")
    shown = capsys.readouterr().out
    for part in ("fits", "18.00 GiB", "XLA Triton product", "all-gather", "bounds the step", "20 - 20", "Assumed"):
        assert part in shown


def test_a_plan_says_that_it_is_of_adapters(capsys):
    plan = a_plan(CONFIG.with_options(lora_rank=8))
    assert plan_as_json(plan, 1)["lora_rank"] == 8
    assert "lora_rank" not in plan_as_json(a_plan(), 1)
    print_plan(plan, 1, "a run")
    assert "LoRA of rank 8 on weights in bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["joined", "separate"])
def test_a_plan_is_of_the_documents_of_a_run(given, monkeypatch, capsys):
    command, planned = importlib.import_module("jaxllm.plan.__main__"), []

    def compiled(config: TrainConfig, target: Any) -> Refused:
        planned.append(config)
        return Refused(config, target, "")

    monkeypatch.setattr(command, "check_extra", lambda *_: None)
    monkeypatch.setattr(command, "compile_plan", compiled)
    assert main(["--preset", "tiny", "--seq", "64", "--documents", given]) == 1
    is_separate = given == "separate"
    assert (Computation.of(planned[0]).batch.documents is not None) == is_separate
    assert ("separate documents" in capsys.readouterr().out) == is_separate


def test_what_the_compiler_refused_does_not_fit(capsys):
    plan = a_plan(out_of_memory="Ran out of memory on HBM")
    assert not plan.fits
    print_plan(plan, 1, "a run")
    assert "does not fit: Ran out of memory on HBM" in capsys.readouterr().out
    assert plan_as_json(plan, 1)["fits"] is False


def test_unknown_loops_are_replaced_by_the_model_s_flops():
    plan = a_plan(unknown_loops=4)
    wanted = plan.model_flops("full") / (ACHIEVED_FLOPS["dot"] * 989.4e12)
    assert plan.roofline.compute == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("start", "fixed", "row", "wanted"),
    [(8, 17.0, 1.0, 55), (8, 17.0, 20.0, 2), (64, 12.0, 0.7, 86), (4, 80.0, 1.0, 1)],
)
def test_a_search_finds_the_largest_batch_in_few_compilations(start, fixed, row, wanted):
    tried = []

    def compiled(size: int) -> Plan:
        tried.append(size)
        return a_plan(TrainConfig.from_options(model=PRESETS["customllm-1b"], batch_size=size), gib=fixed + row * size)

    plan, exact = largest_batch(start, planning.usable_bytes(H100), compiled)
    assert exact
    assert plan.config.data.batch_size == wanted
    assert plan.fits == (fixed < 72)
    assert len(tried) == len({*tried}) <= 8


def test_a_search_stops_and_shows_that_it_is_not_at_the_end(capsys):
    found = largest_batch(
        1, planning.usable_bytes(H100), lambda size: a_plan(TrainConfig.from_options(batch_size=size))
    )
    plan, exact = found
    assert not exact
    assert plan.config.data.batch_size == 2 ** (planning.MAX_COMPILATIONS - 1)
    print_search([found, (Refused(CONFIG, H100, "no memory"), True)], 10**9, "a run")
    shown = capsys.readouterr().out
    assert ">= 2048" in shown
    assert "none" in shown


# Real compilations


@pytest.mark.gpu_compile
@needs_cuda
@pytest.mark.parametrize(
    ("options", "most_gib"),
    [
        (["--target", "h100", "--batch-size", "8", "--seq-len", "2048"], 40),
        (["--target", "rtx4090", "--batch-size", "4", "--seq-len", "256"], 0.92 * 23.63),
    ],
)
def test_the_real_step_fits(options, most_gib, tmp_path, capfd):
    file = tmp_path / "plan.json"
    assert main([*options, "--remat", "--json", str(file)]) == 0
    answer = json.loads(file.read_text())
    assert answer["fits"]
    assert answer["memory"]["peak"] / GIB < most_gib
    assert {"Triton grouped product", "cuDNN fused attention, backward"} <= {*answer["kernels"]}
    assert answer["flops"]["program"] > answer["flops"]["model_causal"]  # layers are computed again
    assert capfd.readouterr().err.count("\n") == 1  # what is compiled


def on_h100s(axis: str, devices: int, tmp_path) -> dict:
    """customllm-1b on H100s along one axis, 8 x 2048 tokens on each."""
    file, rows = tmp_path / "plan.json", str(8 * devices)
    options = ["--mesh", f"{axis}={devices}", "--batch", rows, "--seq", "2048", "--remat", "--json", str(file)]
    assert main(options) == 0
    answer = json.loads(file.read_text())
    assert answer["devices"] == devices
    assert {"Triton grouped product", "cuDNN fused attention, backward"} <= {*answer["kernels"]}
    assert answer["flops"]["program"] < 1.4 * answer["flops"]["model_causal"] / 8  # layers are computed again
    return answer


OTHERS = 7 / 8
"""What a device sends of an array that all eight gather, or of which each keeps an eighth."""


@pytest.mark.gpu_compile
@needs_cuda
def test_fsdp_moves_the_weights_twice_and_the_gradients_once(tmp_path):
    """The weights forward and again backward, cast to bfloat16 before wherever XLA can; the gradients in float32."""
    answer = on_h100s("fsdp", 8, tmp_path)
    cut = sum(parameters(CONFIG.model).values())
    moved = {kind: total["bytes"] for kind, total in answer["collectives"].items()}
    assert moved.keys() == {"all-gather", "reduce-scatter", "all-reduce"}
    assert moved["reduce-scatter"] == pytest.approx(OTHERS * 4 * cut, rel=0.01)
    assert OTHERS * 2 * 2 * cut < moved["all-gather"] < 1.15 * OTHERS * 2 * 2 * cut
    assert moved["all-reduce"] < 2e6
    assert answer["memory"]["arguments"] / GIB == pytest.approx(12.01 / 8, rel=0.01)


@pytest.mark.gpu_compile
@needs_cuda
def test_expert_moves_tokens_and_the_gradients_of_what_is_not_spread(tmp_path):
    """Tokens to all devices in every pass, forward, again, and as gradients; a device keeps one expert of the seven."""
    answer, others = on_h100s("expert", 7, tmp_path), 6 / 7
    parts = parameters(CONFIG.model)
    whole = sum(parts.values()) - parts["routed_experts"]
    tokens = 7 * 8 * 2048 * CONFIG.model.hidden_size * 2 * CONFIG.model.num_hidden_layers  # of all devices, bfloat16
    moved = {kind: total["bytes"] for kind, total in answer["collectives"].items()}
    assert moved.keys() == {"all-gather", "reduce-scatter", "all-reduce"}
    assert moved["all-gather"] == pytest.approx(others * 3 * tokens, rel=0.02)
    assert moved["reduce-scatter"] == pytest.approx(others * 2 * tokens, rel=0.02)
    assert moved["all-reduce"] == pytest.approx(2 * others * 4 * whole, rel=0.02)
    state = 3 * 4 * (whole + parts["routed_experts"] / 7)  # weights and two moments
    assert answer["memory"]["arguments"] == pytest.approx(state, rel=0.01)


@pytest.mark.gpu_compile
@needs_cuda
def test_a_kernel_that_a_device_has_no_room_for_is_one_line(tmp_path, capfd):
    values = json.loads((FOLDER / "rtx4090.json").read_text())
    text = (FOLDER / values["config"]).read_text().replace("optin: 101376", "optin: 50000")
    (tmp_path / "small.txtpb").write_text(text)
    file = Path(tmp_path / "small.json")
    file.write_text(json.dumps(values | {"config": "small.txtpb"}))
    options = ["--target", str(file), "--preset", "tiny", "--seq-len", "128", "--precision", "float32"]
    assert main(options) == 2
    first, error = capfd.readouterr().err.splitlines()
    assert first.startswith("compiling ")
    assert "Shared memory size limit exceeded" in error


@pytest.mark.parametrize(
    ("config", "held"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16", "quantization_config": {}}, "bfloat16"),
        ({}, "float32"),
    ],
)
def test_a_frozen_base_is_planned_in_the_dtype_in_which_a_run_holds_it(config, held, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert held_dtype(tmp_path) == held
