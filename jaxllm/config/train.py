"""The configuration of a training run, in groups. The command line and train_config.json have the same flat options."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

import tyro

from jaxllm.config.fields import check_fields, option, option_names
from jaxllm.config.model import PRESETS, ModelConfig, preset
from jaxllm.errors import UserError, listed, shown

Precision = Literal["float32", "bfloat16"]

FORMAT = 2
"""Version of a run's train_config.json and checkpoints; CHANGELOG.md says what each version holds."""

AXES = ("data", "fsdp", "expert")
"""The axes of a mesh of devices (`jaxllm.model.layout`)."""

# None ends in a space: the tokenizer joins a space to the word after it.
CODE_PROMPTS = (
    "def __init__(self, name, value):",
    "import os",
    "class Error(Exception):",
    "    for key, value in",
    "    def close(self):",
)

STORY_PROMPTS = (
    "Once upon a time, in a land far away",
    "The future of AI will be shaped by",
    "In the middle of the night, I heard a strange noise",
    "The scientist looked at the data and realized",
    "A journey across the ocean began when",
)


class _Checked:
    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class DataConfig(_Checked):
    """What is read, and how it is cut into batches."""

    source: Annotated[str, tyro.conf.arg(name="data")] = "stdlib"
    """`stdlib` (the standard library's own source code), a text, JSONL or parquet file, a folder of
    them, or the name of a dataset on the Hugging Face Hub."""
    subset: Annotated[str | None, tyro.conf.arg(name="data-config")] = None
    """Configuration of a Hub dataset."""
    split: Annotated[str, tyro.conf.arg(name="data-split")] = "train"
    """Split of a Hub dataset."""
    revision: Annotated[str | None, tyro.conf.arg(name="data-revision")] = None
    """Commit of a Hub dataset; default: the newest one when the run starts. The run keeps it."""
    text_field: str = "text"
    """Name of the field that holds the text in JSONL, parquet and Hub data."""
    tokenizer: str | None = None
    """A Hub name or a folder; default: a byte-level BPE trained on the data."""
    seq_len: int = option(256, ge=2)
    """Tokens in a row of a batch."""
    batch_size: int = option(8, ge=1, le=2**20)
    """Rows in a micro-batch, over all devices."""
    grad_accum: int = option(1, ge=1)
    """Micro-batches in a step."""


@dataclass(frozen=True)
class OptimConfig(_Checked):
    """AdamW, and the terms of the loss."""

    learning_rate: float = option(4e-3, ge=0)
    """Peak of the schedule."""
    weight_decay: float = option(0.1, ge=0)
    """Decoupled decay of the matrices; norms, biases and the routing bias have none."""
    beta1: float = option(0.9, ge=0, lt=1)
    beta2: float = option(0.95, ge=0, lt=1)
    adam_eps: float = option(1e-8, gt=0)
    max_grad_norm: float = option(1.0, gt=0)
    """Global gradient norm above which gradients are scaled down."""
    bias_update_rate: float = option(1e-3, ge=0)
    """Step of the auxiliary-loss-free load balancing; 0 turns it off."""
    balance_loss: float = option(0.0, ge=0)
    """Weight of the sequence-wise balance loss."""
    router_z_loss: float = option(0.0, ge=0)
    """Weight of the router z-loss."""


@dataclass(frozen=True)
class ScheduleConfig(_Checked):
    """The learning rate over the steps: linear warm-up, then cosine to 0 at `steps`."""

    steps: int = option(600, ge=1, resumable=True)
    """Optimizer steps."""
    warmup_steps: int = option(50, ge=0)


@dataclass(frozen=True)
class MeshConfig(_Checked):
    """Which devices compute a step, and which processes."""

    parallel: Literal["jit", "pmap"] = option("jit", resumable=True)
    """How a step runs: `jit` on one device or on the --mesh, `pmap` on all devices, each with a copy of the model."""
    axes: Annotated[str, tyro.conf.arg(name="mesh")] = option("", resumable=True)
    """Devices along each axis, e.g. data=2,fsdp=4,expert=1: `data` copies the model, `fsdp` cuts parameters and
    optimizer state, `expert` spreads the routed experts. Empty: one device."""
    coordinator: str | None = option(None, resumable=True, saved=False)
    """Of a run of several processes, HOST:PORT of the first, given to each of them; `auto`: SLURM, Open MPI, Kubernetes
    or the TPU's own environment names it and the rest."""
    num_processes: int | None = option(None, ge=1, resumable=True, saved=False)
    """How many processes there are; all see the same --run-dir and data."""
    process_id: int | None = option(None, resumable=True, saved=False)
    """Which of them this is, from 0."""
    data_streams: int | None = option(None, ge=1, le=2**16)
    """Shards of the data that are read in parallel, each into its own rows of a batch, which they decide. Default: one
    for each process, so that each reads its own."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.sizes and self.parallel == "pmap":
            raise UserError(f"mesh is {shown(self.axes)}: --parallel pmap has no mesh, leave out one of the two")
        rest = (self.num_processes, self.process_id)
        if self.coordinator == "auto" and rest != (None, None):
            raise UserError("coordinator is 'auto': leave out --num-processes and --process-id, which it finds too")
        if self.coordinator is None and rest != (None, None):
            raise UserError("num_processes and process_id need --coordinator HOST:PORT as well")
        if self.coordinator not in (None, "auto"):
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdecimal():
                raise UserError(f"coordinator is {shown(self.coordinator)}: it must be HOST:PORT or auto")
            if self.num_processes is None or self.process_id is None:
                raise UserError(
                    f"coordinator is {shown(self.coordinator)}: pass --num-processes and --process-id as well"
                )
            if not 0 <= self.process_id < self.num_processes:
                raise UserError(f"process_id is {self.process_id}: it must lie in 0 to num_processes - 1")

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis that `axes` names.

        Raises:
            UserError: it is not of that form.
        """
        sizes: dict[str, int] = {}
        for entry in filter(None, self.axes.split(",")):
            axis, _, size = entry.partition("=")
            if axis not in AXES or axis in sizes or not re.fullmatch("[0-9]{1,9}", size) or int(size) < 1:
                raise UserError(
                    f"mesh is {shown(self.axes)}: it must be AXIS=DEVICES,..., each axis of {', '.join(AXES)} at most "
                    "once"
                )
            sizes[axis] = int(size)
        return sizes

    @property
    def devices(self) -> int:
        """Devices of the mesh; 1 without one."""
        return math.prod(self.sizes.values())


@dataclass(frozen=True)
class SaveConfig(_Checked):
    """Which checkpoints a run writes and keeps."""

    save_every: int = option(200, ge=1, resumable=True)
    keep_checkpoints: int = option(2, ge=1, resumable=True)
    """How many of the newest checkpoints are kept; train.py also keeps the one with the lowest evaluation loss."""


@dataclass(frozen=True)
class CheckpointConfig(SaveConfig):
    """Checkpoints and recovery of train.py."""

    keep_every: int = option(0, ge=0, resumable=True)
    """Checkpoints whose step is a multiple of this are kept too; 0: none."""
    strict: bool = option(False, resumable=True, saved=False)
    """Refuse to resume from an older checkpoint where the newest is damaged."""
    max_nonfinite: int = option(10, ge=1, resumable=True)
    """Stop the run after this many steps in a row whose loss or gradient is not finite. Such a step changes nothing."""


@dataclass(frozen=True)
class LoggingConfig(_Checked):
    """What is measured and reported."""

    log_every: int = option(25, ge=1, resumable=True)
    eval_every: int = option(100, ge=1, resumable=True)
    eval_samples: int = option(100, ge=1, resumable=True)
    """Rows of the held-out part that an evaluation reads."""
    peak_tflops: float | None = option(None, gt=0, resumable=True)
    """What one device reaches in matrix products, in TFLOP/s, the reference of the MFU; default:
    measured at the start, in the run's precision."""


@dataclass(frozen=True)
class SamplingConfig(_Checked):
    """The samples at the end of a run."""

    prompts: tuple[str, ...] = option(CODE_PROMPTS, resumable=True)
    """Prompts that the trained model continues at the end."""
    sample_tokens: int = option(96, ge=0, resumable=True)
    """New tokens for each of these prompts; 0 generates nothing."""
    temperature: float = option(0.5, ge=0, resumable=True)
    top_p: float = option(0.95, gt=0, le=1, resumable=True)


Group = TypeVar("Group")
Flat = Annotated[Group, tyro.conf.OmitArgPrefixes]
"""A group whose options have no prefix on the command line."""


@dataclass(frozen=True)
class RunConfig:
    """What decides a training run in either framework: all that `python -m torch_ref.train` takes."""

    preset: str = option("tiny", resumable=True)
    """Model preset: one of jaxllm.PRESETS."""
    recipe: str = option("default", resumable=True)
    """Training recipe: `default` (minutes on a CPU) or `seed` (the source's run)."""
    model: ModelConfig = field(default_factory=lambda: PRESETS["tiny"])
    """Single values of the preset can be overridden, e.g. --model.num-hidden-layers 2."""
    run_dir: Path | None = option(None, resumable=True)
    """Folder of the run; default: runs/PRESET."""
    overwrite: bool = option(False, resumable=True, saved=False)
    """Delete the earlier run in the folder and start over."""
    precision: Precision = "float32"
    """Compute precision; master weights and moments are always float32."""
    remat: bool = option(False, resumable=True)
    """Recompute each layer in the backward pass instead of keeping its activations."""
    seed: int = option(0, ge=0, le=2**63 - 1)
    data: Flat[DataConfig] = field(default_factory=DataConfig)
    optim: Flat[OptimConfig] = field(default_factory=OptimConfig)
    schedule: Flat[ScheduleConfig] = field(default_factory=ScheduleConfig)
    checkpoint: Flat[SaveConfig] = field(default_factory=SaveConfig)
    logging: Flat[LoggingConfig] = field(default_factory=LoggingConfig)
    sampling: Flat[SamplingConfig] = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.data.seq_len > self.model.max_position_embeddings:
            raise UserError(
                f"seq_len is {self.data.seq_len}: the position table has "
                f"max_position_embeddings = {self.model.max_position_embeddings} rows"
            )

    @property
    def folder(self) -> Path:
        return self.run_dir or Path("runs") / self.preset

    @property
    def data_streams(self) -> int:
        """Shards of the data that are read in parallel."""
        return 1

    @property
    def tokens_per_step(self) -> int:
        return self.data.grad_accum * self.data.batch_size * self.data.seq_len

    @classmethod
    def from_options(cls, **options: Any) -> Self:
        """A config from flat options, e.g. `from_options(preset="tiny", steps=100, data="corpus")`."""
        return cls()._replaced(options)

    def with_options(self, **options: Any) -> Self:
        """A copy in which flat options have other values."""
        return self._replaced(options)

    def _replaced(self, options: Mapping[str, Any]) -> Self:
        changes: dict[str | None, dict[str, Any]] = {}
        for known in _options(type(self)):
            if known.name in options:
                changes.setdefault(known.group, {})[known.attribute] = options[known.name]
        if unknown := sorted(options.keys() - {known.name for known in _options(type(self))}):
            raise UserError(f"the training config has {listed(unknown)}, which this version does not know")
        own = changes.pop(None, {})
        groups = {name: dataclasses.replace(getattr(self, name), **changed) for name, changed in changes.items()}
        return dataclasses.replace(self, **own, **groups)

    def options(self) -> dict[str, Any]:
        """All flat options, as JSON values."""
        run_dir = None if self.run_dir is None else str(self.run_dir)
        as_json = {"model": self.model.to_dict(), "run_dir": run_dir, "prompts": list(self.sampling.prompts)}
        return {known.name: known.value(self) for known in _options(type(self))} | as_json

    def to_dict(self) -> dict[str, Any]:
        """The flat options that train_config.json keeps, as JSON values."""
        values = self.options()
        return {"format": FORMAT} | {known.name: values[known.name] for known in _options(type(self)) if known.saved}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping such as a run's train_config.json: the inverse of `to_dict`.

        Options that did not exist when it was written have their defaults.

        Raises:
            UserError: the format is another, a key is unknown, the model is missing, or a value is out of its range.
        """
        values = dict(values)
        if (written := values.pop("format", 1)) != FORMAT:
            raise UserError(
                f"the training config has format {shown(written)}, and this version resumes format {FORMAT} (see "
                "CHANGELOG.md): finish the run with the version that wrote it, or start a new run from its weights"
            )
        model, prompts, run_dir = (values.get(name) for name in ("model", "prompts", "run_dir"))
        if not isinstance(model, Mapping):
            raise UserError(f"the training config's model is {shown(model)}: it must be an object")
        converted: dict[str, Any] = {"model": ModelConfig.from_dict(model)}
        if isinstance(prompts, list):
            converted["prompts"] = tuple(prompts)
        if isinstance(run_dir, str):
            converted["run_dir"] = Path(run_dir)
        return cls.from_options(**{**values, **converted})

    def as_type(self, cls: type[Config]) -> Config:
        """The options that `cls` has, as a `cls`; its other options have their defaults."""
        known = {known.name for known in _options(cls)} | {"format"}
        return cls.from_dict({name: value for name, value in self.to_dict().items() if name in known})


Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Everything that decides a run of train.py. `train.py --help` is this class."""

    checkpoint: Flat[CheckpointConfig] = field(default_factory=CheckpointConfig)
    mesh: Flat[MeshConfig] = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, model, sizes = self.data.batch_size, self.model, self.mesh.sizes
        if rows % self.mesh.devices:
            raise UserError(
                f"mesh is {shown(self.mesh.axes)}: its {self.mesh.devices} devices must divide batch_size = {rows}, "
                f"whose rows they share (sizes that do: {_divisors(rows)})"
            )
        common = math.gcd(model.hidden_size, model.num_attention_heads * model.rope_head_dim)
        if common % sizes.get("fsdp", 1):
            raise UserError(
                f"mesh is {shown(self.mesh.axes)}: fsdp must divide hidden_size = {model.hidden_size} and half of it, "
                f"along which weights are cut (sizes that do: {_divisors(common)})"
            )
        if model.n_routed_experts % sizes.get("expert", 1):
            raise UserError(
                f"mesh is {shown(self.mesh.axes)}: expert must divide n_routed_experts = {model.n_routed_experts} "
                f"(sizes that do: {_divisors(model.n_routed_experts)})"
            )
        if self.mesh.data_streams is not None and rows % self.mesh.data_streams:
            raise UserError(
                f"data_streams is {self.mesh.data_streams}: it must divide batch_size = {rows} "
                f"(sizes that do: {_divisors(rows)})"
            )

    @property
    def data_streams(self) -> int:
        return self.mesh.data_streams or 1


class _Option(NamedTuple):
    """Where a flat option lies in a config, and what `option` declared of it."""

    group: str | None  # None: the config itself
    attribute: str
    name: str
    resumable: bool
    saved: bool

    def value(self, config: RunConfig) -> Any:
        return getattr(config if self.group is None else getattr(config, self.group), self.attribute)


@functools.cache
def _options(cls: type[RunConfig]) -> tuple[_Option, ...]:
    def declared(group: str | None, fields: Iterable[dataclasses.Field], names: Mapping[str, str]) -> Iterator[_Option]:
        for each in fields:
            resumable, saved = each.metadata.get("resumable", False), each.metadata.get("saved", True)
            yield _Option(group, each.name, names[each.name], resumable, saved)

    groups = {f.name: f.default_factory for f in dataclasses.fields(cls) if isinstance(f.default_factory, type)}
    outer = [f for f in dataclasses.fields(cls) if f.name not in groups]
    found = [*declared(None, outer, option_names(cls))]
    for name, group in groups.items():
        found += declared(name, dataclasses.fields(group), option_names(group))
    return tuple(found)


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def changed_options(saved: Mapping[str, Any], now: RunConfig) -> list[tuple[str, Any, Any]]:
    """The options (the model's as `model.NAME`) that forbid resuming a saved `to_dict()`: name, old and new value."""
    resumable = {known.name for known in _options(type(now)) if known.resumable}

    def flat(values: Mapping[str, Any]) -> dict[str, Any]:
        model = values.get("model")
        outer = {name: value for name, value in values.items() if name != "model" and name not in resumable}
        return outer | {f"model.{k}": v for k, v in (model.items() if isinstance(model, Mapping) else ())}

    before, after = flat(saved), flat(now.to_dict())
    return [(k, before.get(k), after.get(k)) for k in sorted(before | after) if before.get(k) != after.get(k)]


def recipe(name: str, preset_name: str, cls: type[Config] = TrainConfig) -> Config:
    """The training recipe `name` for a model preset.

    Raises:
        UserError: there is no such recipe or preset.
    """
    base = cls.from_options(preset=preset_name, model=preset(preset_name))
    if name == "default":
        return base
    if name == "seed":
        return base.with_options(
            recipe="seed",
            data="HuggingFaceTB/smollm-corpus",
            data_config="cosmopedia-v2",
            tokenizer="HuggingFaceTB/cosmo2-tokenizer",
            seq_len=256,
            batch_size=4,
            grad_accum=8,
            steps=10_000,
            learning_rate=2e-5,
            warmup_steps=2_000,
            weight_decay=0.0,
            beta2=0.999,
            log_every=100,
            eval_every=1_000,
            save_every=1_000,
            prompts=STORY_PROMPTS,
        )
    raise UserError(f"recipe is {name!r}: choose one of default, seed")
