"""Estimate a training step on a GPU or TPU that you do not have: memory, kernels, FLOPs, traffic, time.

python -m jaxllm.plan --preset customllm-1b --target h100 --batch-size 8 --seq-len 2048 --remat
python -m jaxllm.plan --preset moonlight-16b --lora-rank 16 --target h200 --batch 4 --seq 4096 --remat
python -m jaxllm.plan --preset customllm-1b --target h100 --mesh fsdp=8 --batch-size 64 --seq-len 2048 --remat

The real step is compiled for a described device, in a separate process; nothing runs, and no device is used. Times
are computed from data sheets (`jaxllm.plan.roofline`), not measurements.
"""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxllm.command_line import parse
from jaxllm.config import PRESETS, LoraConfig, Precision, TrainConfig, preset, recipe
from jaxllm.config.fields import check_fields, option
from jaxllm.devices import load_target
from jaxllm.errors import UserError, exit_on_user_error
from jaxllm.files import read_json, write_json
from jaxllm.plan.estimate import Plan, Refused, check_extra, compile_plan, largest_batch, meshes, usable_bytes
from jaxllm.plan.report import plan_as_json, print_plan, print_search
from jaxllm.store.folder import MODEL_FILE, read_model_config
from jaxllm.store.source import model_folder

DEFAULT = "customllm-1b"


@dataclass(frozen=True)
class PlanArgs:
    """Compile the training step for a device that you do not have. Exits with 1 if it does not fit."""

    preset: Annotated[
        str | None, tyro.conf.arg(help=f"The model's shape: one of {', '.join(PRESETS)}. Default: {DEFAULT}.")
    ] = None
    init: Path | None = None
    """A folder whose config.json gives the model's shape, in place of --preset."""
    lora: Annotated[LoraConfig, tyro.conf.OmitArgPrefixes] = LoraConfig()
    target: str = "h100"
    """A file of jaxllm/devices by its name (h100, a100-80, l4, rtx4090, tpu-v5p ...), or the path of another."""
    devices: int | None = option(None, ge=1)
    """Devices of one node; default: those of the mesh."""
    mesh: str = ""
    """Devices along each axis, as for train.py; default: all along fsdp. A search tries others too."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["--batch"])] = 8
    """Rows in a micro-batch, over all devices; a search starts from it."""
    seq_len: Annotated[int, tyro.conf.arg(aliases=["--seq"])] = 2048
    """Tokens in a row."""
    grad_accum: int = 1
    """Micro-batches in a step."""
    documents: Literal["joined", "separate"] = "joined"
    """`separate`, as for chats: attention stays within a document."""
    precision: Precision = "bfloat16"
    """Compute precision."""
    remat: bool = False
    """Recompute each layer in the backward pass; a search tries both."""
    tokens: int | None = option(None, ge=1, le=2**63)
    """Tokens of the run to be timed; default: those of the recipe `seed`."""
    json: Path | None = None
    """Write the result to this file, as JSON."""
    search: bool = False
    """Find the largest batch size that fits."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.init is not None and self.preset is not None:
            raise UserError(f"preset is {self.preset!r}: --init gives the model, leave out one of the two")
        if self.json is not None and not self.json.absolute().parent.is_dir():
            raise UserError(f"json is {self.json}: there is no folder {self.json.parent}, make it first")
        if self.json is not None and self.json.is_dir():
            raise UserError(f"json is {self.json}: it is a folder, name a file in it")


def held_dtype(init: Path) -> Any:
    """In which a run holds the frozen matrices of a folder, by its config.json; FP8 is held in bfloat16."""
    values = read_json(model_folder(init) / MODEL_FILE)
    fp8 = "quantization_config" in values
    named = values.get("dtype") or values.get("torch_dtype") or ("bfloat16" if fp8 else "float32")
    if named not in ("bfloat16", "float16") or (fp8 and named == "float16"):  # the two have no narrower common dtype
        return "float32"
    return named


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    args: PlanArgs = parse(PlanArgs, argv, "python -m jaxllm.plan", __doc__)
    target, name = load_target(args.target), args.preset or DEFAULT
    config = TrainConfig.from_options(
        preset=name if args.init is None else args.init.absolute().name,
        model=preset(name) if args.init is None else read_model_config(model_folder(args.init)),
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        grad_accum=args.grad_accum,
        documents=args.documents,
        precision=args.precision,
        remat=args.remat,
        mesh=args.mesh or (f"fsdp={args.devices}" if args.devices and args.devices > 1 else ""),
    )
    lora = args.lora if args.init is None else dataclasses.replace(args.lora, base_dtype=held_dtype(args.init))
    config = dataclasses.replace(config, lora=lora)
    if args.devices not in (None, config.mesh.devices):
        raise UserError(f"devices is {args.devices}: the mesh {args.mesh!r} has {config.mesh.devices}, leave out one")
    if config.mesh.devices > target.devices:
        raise UserError(
            f"mesh is {config.mesh.axes!r}: its {config.mesh.devices} devices are more than the {target.devices} of a "
            f"node ({target.name}): a plan covers one node, pass a smaller --mesh"
        )
    check_extra(args.target, target)
    seed = recipe("seed", name)
    tokens = args.tokens or seed.schedule.steps * seed.tokens_per_step
    run = f"{tokens:,} tokens" if args.tokens else f"the recipe seed: {tokens:,} tokens"

    if args.search:
        found = []
        for mesh, remat in itertools.product(meshes(config), (False, True)):

            def compiled(rows: int, mesh: str = mesh, remat: bool = remat) -> Plan | Refused:
                size = rows * config.mesh.devices
                return compile_plan(config.with_options(batch_size=size, mesh=mesh, remat=remat), target)

            found.append(largest_batch(args.batch_size // config.mesh.devices, usable_bytes(target), compiled))
        print_search(found, tokens, run)
        answer = {"search": [{"exact": exact, **plan_as_json(plan, tokens)} for plan, exact in found]}
        fits = any(plan.fits for plan, _ in found)
    else:
        plan = compile_plan(config, target)
        print_plan(plan, tokens, run)
        answer, fits = plan_as_json(plan, tokens), plan.fits
    if args.json:
        write_json(args.json, answer)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
