"""The configuration of a training run. The command line and train_config.json have the same flat options."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

import tyro

from jaxllm.config import groups
from jaxllm.config.fields import MAX_SEED, check_fields, option, option_names
from jaxllm.config.lora import LoraConfig
from jaxllm.config.model import ModelConfig
from jaxllm.config.presets import PRESETS, TOKENIZER_SIZED_PRESETS, preset
from jaxllm.errors import UserError, listed, shown

Precision = Literal["float32", "bfloat16"]
PrecisionOption = Literal["auto", "float32", "bfloat16"]
KernelsOption = Literal["auto", "plain"]

FORMAT = 2
"""Version of a run's train_config.json and checkpoints; docs/reference/run-folder.md says what each one holds."""

Group = TypeVar("Group")
Flat = Annotated[Group, tyro.conf.OmitArgPrefixes]
"""A group whose options have no prefix on the command line."""


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a training run in either framework: all options of `python -m torch_ref.train`."""

    preset: Annotated[str, tyro.conf.arg(help=f"The model's shape: one of {', '.join(PRESETS)}.")] = option(
        "tiny", resumable=True, common=True
    )
    recipe: str = option("default", resumable=True, common=True)
    """Training recipe: `default` (minutes on a CPU) or `seed` (the source's run)."""
    model: ModelConfig = field(default_factory=lambda: PRESETS["tiny"])
    """Single values of the preset can be overridden, e.g. --model.num-hidden-layers 2."""
    run_dir: Path | None = option(None, resumable=True, saved=False, common=True)
    """Folder of the run; default: runs/PRESET."""
    overwrite: bool = option(False, resumable=True, saved=False, common=True)
    """Delete the earlier run in the folder and start over."""
    precision: PrecisionOption = option("float32", common=True)
    """Compute precision; master weights and moments are always float32. `auto`, which the default recipe of train.py
    has: bfloat16 where all devices multiply it in hardware (NVIDIA GPUs from Ampere on, AMD's with matrix cores, a TPU,
    a CPU with AMX or AVX512-BF16), else float32. A resumed run keeps its precision."""
    remat: bool = option(False, resumable=True, common=True)
    """Recompute each layer in the backward pass. Without it, the results of matrix products are saved."""
    seed: int = option(0, ge=0, le=MAX_SEED, common=True)
    """Random seed of the weights, the order of the data, dropout and the samples."""
    data: Flat[groups.DataConfig] = field(default_factory=groups.DataConfig)
    optim: Flat[groups.OptimConfig] = field(default_factory=groups.OptimConfig)
    schedule: Flat[groups.ScheduleConfig] = field(default_factory=groups.ScheduleConfig)
    checkpoint: Flat[groups.SaveConfig] = field(default_factory=groups.SaveConfig)
    logging: Flat[groups.LoggingConfig] = field(default_factory=groups.LoggingConfig)
    sampling: Flat[groups.SamplingConfig] = field(default_factory=groups.SamplingConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.data.seq_len > self.model.max_position_embeddings:
            raise UserError(
                f"seq_len is {self.data.seq_len}: it must be at most "
                f"max_position_embeddings = {self.model.max_position_embeddings}"
            )

    @property
    def folder(self) -> Path:
        return self.run_dir or Path("runs") / self.preset

    @property
    def decided_precision(self) -> Precision:
        """The precision of a run that has started: `auto`, which `jaxllm.run.prepare` decides, is a UserError."""
        if self.precision == "auto":
            raise UserError("precision is 'auto': only a run decides it, at its start; choose float32 or bfloat16")
        return self.precision

    @property
    def data_streams(self) -> int:
        """Shards of the data that are read in parallel."""
        return 1

    @property
    def adapters(self) -> LoraConfig | None:
        """The adapters that are trained in place of all weights, if the run has some."""
        return None

    @property
    def given_vocab_size(self) -> int | None:
        """The model's rows for tokens; None: as many as the tokenizer needs, as of a tokenizer-sized preset."""
        size = self.model.vocab_size
        is_sized = self.preset in TOKENIZER_SIZED_PRESETS and size == PRESETS[self.preset].vocab_size
        return None if is_sized else size

    @property
    def tokens_per_step(self) -> int:
        return self.data.grad_accum * self.data.batch_size * self.data.seq_len

    @classmethod
    def from_options(cls, **options: Any) -> Self:
        """A config from flat options, e.g. `from_options(preset="tiny", steps=100, data="corpus")`."""
        return cls().with_options(**options)

    def with_options(self, **options: Any) -> Self:
        """A copy in which flat options have other values."""
        if unknown := sorted(options.keys() - {known.name for known in _options(type(self))}):
            raise UserError(f"the training config has {listed(unknown)}, which this version does not know")
        changes: dict[str, dict[str, Any]] = {}
        for known in _options(type(self)):
            if known.name in options:
                changes.setdefault(known.group or "", {})[known.attribute] = options[known.name]
        own = changes.pop("", {})
        changed = {name: dataclasses.replace(getattr(self, name), **new) for name, new in changes.items()}
        return dataclasses.replace(self, **own, **changed)

    def options(self) -> dict[str, Any]:
        """All flat options, as JSON values."""
        values = {
            known.name: getattr(getattr(self, known.group) if known.group else self, known.attribute)
            for known in _options(type(self))
        }
        paths = {name: str(value) for name, value in values.items() if isinstance(value, Path)}
        return values | paths | {"model": self.model.to_dict(), "prompts": list(self.sampling.prompts)}

    def to_dict(self) -> dict[str, Any]:
        """The flat options that train_config.json keeps, as JSON values."""
        values = self.options()
        return {"format": FORMAT} | {known.name: values[known.name] for known in _options(type(self)) if known.saved}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Options that its version did not have get their defaults.

        Raises:
            UserError: the format differs, a key is unknown, the model is missing, or a value is out of its range.
        """
        values = dict(values)
        if (written := values.pop("format", 1)) != FORMAT:
            raise UserError(
                f"the training config has format {shown(written)}, and this version resumes format {FORMAT} (see "
                "CHANGELOG.md): finish the run with the version that wrote it, or start a new run from its weights"
            )
        if not isinstance(values.get("model"), Mapping):
            raise UserError(f"the training config's model is {shown(values.get('model'))}: it must be an object")
        values["model"] = ModelConfig.from_dict(values["model"])
        if isinstance(prompts := values.get("prompts"), list):
            values["prompts"] = tuple(prompts)
        values.setdefault("special_tokens_in_text", "earlier")  # of a version without this option, as the next two
        values.setdefault("train_on", "all")
        values.setdefault("documents", "joined")
        values.pop("run_dir", None)  # of an earlier version; the folder in which the file lies counts
        values.setdefault("hold_out", "count")  # of an earlier version
        return cls.from_options(**values)

    def as_type(self, cls: type[Config]) -> Config:
        """The options that `cls` has, as a `cls`; its other options have their defaults."""
        known = {known.name for known in _options(cls)} | {"format"}
        return cls.from_dict({name: value for name, value in self.to_dict().items() if name in known})


Config = TypeVar("Config", bound=RunConfig)


NEEDS_INIT = "lora_rank is {}: adapters need weights to adapt, pass --init FOLDER"


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """The configuration of a run of train.py; `train.py --help-all` prints it."""

    init: Path | None = option(None, resumable=True, common=True)
    """Start a new run from the weights in this folder: a model of the DeepSeek family, or an exported CustomLLM. The
    model's shape and, if the folder has one, the tokenizer are taken from it. The learning rate is then 2e-5 (with
    --lora-rank 2e-4, after 20 steps of warm-up), and the run's folder runs/NAME."""
    adapter: Path | None = option(None)
    """Continue training this adapter, a folder of PEFT: its rank, alpha and matrices are the defaults of --lora-..."""
    kernels: KernelsOption = option("auto", resumable=True)
    """`auto`: the fastest kernels of the device; on a GPU each is checked at the start, and what fails is replaced.
    `plain`: kernels that run on any device, unchecked. A resumed run may change it: results differ by rounding, as
    between devices."""
    checkpoint: Flat[groups.CheckpointConfig] = field(default_factory=groups.CheckpointConfig)
    mesh: Flat[groups.MeshConfig] = field(default_factory=groups.MeshConfig)
    lora: Flat[LoraConfig] = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter is not None and not self.adapters:
            raise UserError(f"adapter is {str(self.adapter)!r}, and lora_rank is 0: leave out one of the two")
        if self.adapters and self.optim.optimizer != "adamw":
            if self.init is None:  # the optimizer may be that of the default recipe
                raise UserError(NEEDS_INIT.format(self.lora.rank))
            raise UserError(
                f"optimizer is {self.optim.optimizer!r}: Muon needs whole matrices, not the factors of an "
                "adapter; pass --optimizer adamw with --lora-rank"
            )
        rows, model, mesh = self.data.batch_size, self.model, f"mesh is {shown(self.mesh.axes)}: "
        heads = [model.nope_head_dim, model.value_head_dim] + [model.rope_head_dim] * bool(model.q_latent_size)
        cut = math.gcd(model.hidden_size, *(model.num_attention_heads * size for size in heads))
        _check_divides(
            rows, self.mesh.devices, f"{mesh}its {self.mesh.devices} devices must divide batch_size = {rows}"
        )
        _check_divides(
            cut,
            self.mesh.sizes.get("fsdp", 1),
            f"{mesh}fsdp must divide hidden_size = {model.hidden_size} and the sizes of all heads together (largest "
            f"common divisor {cut}), along which weights are cut",
        )
        _check_divides(
            model.n_routed_experts,
            self.mesh.sizes.get("expert", 1),
            f"{mesh}expert must divide n_routed_experts = {model.n_routed_experts}",
        )
        streams = self.data_streams
        _check_divides(rows, streams, f"data_streams is {streams}: it must divide batch_size = {rows}")

    @property
    def folder(self) -> Path:
        return super().folder if self.init is None or self.run_dir else Path("runs") / self.init.absolute().name

    @property
    def data_streams(self) -> int:
        return self.mesh.data_streams or 1

    @property
    def given_vocab_size(self) -> int | None:
        return super().given_vocab_size if self.init is None else self.model.vocab_size  # trained weights have theirs

    @property
    def adapters(self) -> LoraConfig | None:
        return self.lora if self.lora.rank else None


def _check_divides(n: int, divisor: int, message: str) -> None:
    if n % divisor:
        raise UserError(f"{message} (sizes that do: {', '.join(str(d) for d in range(1, n + 1) if n % d == 0)})")


class _Option(NamedTuple):
    """The place of a flat option in a config, and what `option` declared for it."""

    group: str | None  # None: the config itself
    attribute: str
    name: str
    resumable: bool
    saved: bool


@functools.cache
def _options(cls: type[RunConfig]) -> tuple[_Option, ...]:
    kinds = {f.name: f.default_factory for f in dataclasses.fields(cls) if isinstance(f.default_factory, type)}
    found = []
    for group, kind in {None: cls, **kinds}.items():
        for f in dataclasses.fields(kind):
            if group is not None or f.name not in kinds:
                resumable, saved = f.metadata.get("resumable", False), f.metadata.get("saved", True)
                found.append(_Option(group, f.name, option_names(kind)[f.name], resumable, saved))
    return tuple(found)


def changed_options(saved: Mapping[str, Any], now: RunConfig) -> list[tuple[str, Any, Any]]:
    """The options (the model's as `model.NAME`) whose change prevents a resume: name, old and new value."""
    resumable = {known.name for known in _options(type(now)) if known.resumable}

    def run_options(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name != "model" and name not in resumable}

    model = ModelConfig.from_dict(saved["model"])  # with the defaults of later fields
    return sorted(_changed(run_options(saved), run_options(now.to_dict())) + changed_model(model, now.model))


def changed_model(before: ModelConfig, now: ModelConfig) -> list[tuple[str, Any, Any]]:
    """The options of the model that differ, as `model.NAME`: name, old and new value."""

    def flat(model: ModelConfig) -> dict[str, Any]:
        fields = dataclasses.asdict(model)
        nested = {name: fields.pop(name) for name in ("router", "rope_scaling")}
        fields |= {f"{name}.{key}": value for name, group in nested.items() for key, value in group.items()}
        return {f"model.{name}": value for name, value in fields.items()}

    return _changed(flat(before), flat(now))


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(k, before.get(k), after.get(k)) for k in sorted(before | after) if before.get(k) != after.get(k)]


SEED_RECIPE = {
    "recipe": "seed", "data": "HuggingFaceTB/smollm-corpus", "data_config": "cosmopedia-v2",
    "tokenizer": "HuggingFaceTB/cosmo2-tokenizer", "seq_len": 256, "batch_size": 4, "grad_accum": 8, "steps": 10_000,
    "learning_rate": 2e-5, "warmup_steps": 2_000, "weight_decay": 0.0, "beta2": 0.999, "log_every": 100,
    "log_format": "dict",
    "eval_every": 1_000, "save_every": 1_000, "prompts": groups.STORY_PROMPTS,
}  # fmt: skip
"""The source's run, where it differs from the defaults."""


DEFAULT_RECIPE: dict[str, Any] = {
    "optimizer": "muon", "learning_rate": 8e-3, "muon_momentum": 0.8, "bias_update_rate": 5e-3, "steps": 700,
}  # fmt: skip
"""The settings with the lowest loss of `tiny` in the time of the default run; docs/muon.md describes the search. The
defaults of the options themselves are AdamW's, as in runs of versions without Muon."""


def recipe(name: str, preset_name: str, cls: type[Config] = TrainConfig) -> Config:
    """The training recipe `name` for a model preset. Raises a UserError if there is no such recipe or preset."""
    changes = {"default": DEFAULT_RECIPE, "seed": SEED_RECIPE}
    if name not in changes:
        raise UserError(f"recipe is {name!r}: choose one of {', '.join(changes)}")
    return cls.from_options(preset=preset_name, model=preset(preset_name), **changes[name])
