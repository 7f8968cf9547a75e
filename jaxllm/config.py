"""Model and training configuration: presets, recipes, validation. Imports no JAX."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxllm.atomic import write_text_atomically
from jaxllm.bounded import read_bounded
from jaxllm.errors import UserError
from jaxllm.shown import listed, shown

Precision = Literal["float32", "bfloat16"]

AXES = ("data", "fsdp", "expert")
"""The axes of a mesh of devices (`jaxllm.sharding`)."""

# The fields of ModelConfig that name tokens; a model that came without its tokenizer has none of them.
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

MAX_JSON_BYTES = 8 * 2**20
"""Of a config file, or of an index of weights: far more than the largest models need."""

# What no model or run exceeds. A config may come from anywhere: nothing may loop or allocate as far as it says.
LARGEST = {
    "vocab_size": 2**24, "hidden_size": 2**20, "moe_intermediate_size": 2**20, "num_hidden_layers": 2**12,
    "num_attention_heads": 2**16, "n_routed_experts": 2**14, "n_shared_experts": 2**14, "batch_size": 2**20,
    "data_streams": 2**16, "seed": 2**63 - 1,
}  # fmt: skip
LARGEST_INT = 2**31 - 1


def _matches(value: Any, annotation: Any) -> bool:
    """Whether a value (perhaps read from JSON) has the annotated type; ints pass for floats."""
    if isinstance(annotation, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(annotation))
    if typing.get_origin(annotation) is Literal:
        return value in typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if annotation is float:
        return (
            isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        )  # not NaN
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _check_types(config: Any) -> None:
    for name, annotation in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _matches(value, annotation):
            wanted = " or ".join(str(option) for option in typing.get_args(annotation))
            wanted = wanted or getattr(annotation, "__name__", str(annotation))
            raise UserError(f"{name} is {shown(value)}: it must be {wanted}")
        if annotation is float:
            object.__setattr__(config, name, float(value))  # JAX refuses an int beyond 32 bits
        largest = LARGEST.get(name, LARGEST_INT)
        if int in (annotation, *typing.get_args(annotation)) and value is not None and value > largest:
            raise UserError(f"{name} is {shown(value)}: it must be at most {largest}")


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def _check_at_least(config: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < minimum:
            raise UserError(f"{name} is {shown(value)}: it must be at least {minimum}")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a CustomLLM, in transformers' words (the keys of an exported config.json).

    Derived sizes are properties; nothing about devices or precision belongs here.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    moe_intermediate_size: int
    compression_ratio: int = 4
    """Hidden size over the size of each attention latent."""
    n_routed_experts: int = 7
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    dropout: float = 0.1
    """Dropout rate on the embeddings, in training only."""
    final_norm: bool = False
    """Whether a norm stands before lm_head (the source has none)."""
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(
            self, 1, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "moe_intermediate_size", "compression_ratio", "n_routed_experts", "n_shared_experts",
            "num_experts_per_tok", "max_position_embeddings",
        )  # fmt: skip
        _check_at_least(self, 0, "rms_norm_eps", "initializer_range")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size is {self.hidden_size}: it must be a multiple of "
                f"num_attention_heads = {self.num_attention_heads}"
            )
        if self.head_dim % 4:
            raise UserError(
                f"num_attention_heads is {self.num_attention_heads}: hidden_size / num_attention_heads = "
                f"{self.head_dim} must be a multiple of 4, because half of each head rotates in pairs"
            )
        if self.hidden_size % self.compression_ratio:
            raise UserError(
                f"compression_ratio is {self.compression_ratio}: it must divide hidden_size = {self.hidden_size}"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise UserError(
                f"num_experts_per_tok is {self.num_experts_per_tok}: it must be at most "
                f"n_routed_experts = {self.n_routed_experts}"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}: it must lie in [0, 1)")
        if self.rope_theta <= 1:
            raise UserError(f"rope_theta is {self.rope_theta}: it must be larger than 1")
        for name in SPECIAL_TOKENS:
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise UserError(f"{name} is {shown(value)}: it must lie below vocab_size = {self.vocab_size}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rope_head_dim(self) -> int:
        """Rotary dimensions of a head; the other half carries no position."""
        return self.head_dim // 2

    @property
    def nope_head_dim(self) -> int:
        return self.head_dim - self.rope_head_dim

    @property
    def latent_size(self) -> int:
        return self.hidden_size // self.compression_ratio

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Build from a mapping such as a config.json; keys that belong to transformers are passed over.

        Raises:
            UserError: a required key is missing, or a value is out of its range.
        """
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if missing := sorted(required - values.keys()):
            raise UserError(f"the model config lacks {', '.join(missing)}")
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file of at most so many bytes.

    Raises:
        UserError: the file cannot be read, is larger, or holds something else.
    """
    content = read_bounded(path, most)
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=unique_keys)
        if re.search(rb"\\u[dD][89a-fA-F]", content):  # halves of surrogate pairs alone: no file name, no token
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file. Of a key that comes twice, readers take the first or the last: nobody knows which."""
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {shown(twice)} comes twice in an object")
    return values


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text_atomically(path, json.dumps(value, indent=2) + "\n")


PRESETS: dict[str, ModelConfig] = {
    # the default of train.py: trained in minutes on two cores; its vocabulary is the tokenizer's
    "tiny": ModelConfig(
        vocab_size=4096,
        hidden_size=192,
        num_hidden_layers=3,
        num_attention_heads=3,
        moe_intermediate_size=256,
        max_position_embeddings=512,
        dropout=0.0,
        final_norm=True,
    ),
    # the source's breakdown
    "customllm-768": ModelConfig(
        vocab_size=49152,
        hidden_size=768,
        num_hidden_layers=24,
        num_attention_heads=12,
        moe_intermediate_size=1536,
    ),
    # the source's printed tree: 1,075,060,736 parameters
    "customllm-1b": ModelConfig(
        vocab_size=49152,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        moe_intermediate_size=1536,
    ),
}

# Presets without a vocabulary of their own: train.py gives them the tokenizer's size.
TOKENIZER_SIZED_PRESETS = frozenset({"tiny"})

# None ends in a space: the tokenizer joins a space to the word behind it.
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


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run. `train.py --help` is this class."""

    preset: str = "tiny"
    """Model preset: one of jaxllm.PRESETS."""
    recipe: str = "default"
    """Training recipe: `default` (minutes on a CPU) or `seed` (the source's run)."""
    model: ModelConfig = field(default_factory=lambda: PRESETS["tiny"])
    """Single values of the preset can be overridden, e.g. --model.num-hidden-layers 2."""
    run_dir: Path | None = None
    """Folder of the run; default: runs/PRESET."""
    overwrite: bool = False
    """Delete what an earlier run left in the folder and start anew."""

    data: str = "stdlib"
    """`stdlib` (the standard library's own source code), a text, JSONL or parquet file, a folder of
    them, or the name of a dataset on the Hugging Face Hub."""
    data_config: str | None = None
    """Configuration of a Hub dataset."""
    data_split: str = "train"
    """Split of a Hub dataset."""
    data_revision: str | None = None
    """Commit of a Hub dataset; default: the newest one when the run starts, to which it then keeps."""
    text_field: str = "text"
    """Name of the field that holds the text in JSONL, parquet and Hub data."""
    tokenizer: str | None = None
    """A Hub name or a folder; default: a byte-level BPE trained on the data."""

    seq_len: int = 256
    """Tokens in a row of a batch."""
    batch_size: int = 8
    """Rows in a micro-batch."""
    grad_accum: int = 1
    """Micro-batches in a step."""
    steps: int = 600
    """Optimizer steps."""
    learning_rate: float = 4e-3
    """Peak of the schedule: linear warm-up, then cosine to 0 at `steps`."""
    warmup_steps: int = 50
    weight_decay: float = 0.1
    """Decoupled decay of the matrices; norms, biases and the routing bias have none."""
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    bias_update_rate: float = 1e-3
    """Step of the auxiliary-loss-free load balancing; 0 turns it off."""
    balance_loss: float = 0.0
    """Weight of the sequence-wise balance loss."""
    router_z_loss: float = 0.0
    """Weight of the router z-loss."""
    precision: Precision = "float32"
    """Compute precision; master weights and moments are float32 always."""
    remat: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    seed: int = 0

    parallel: Literal["jit", "pmap"] = "jit"
    """How a step runs: `jit` on one device or on the --mesh, `pmap` on all devices, each with a copy of the model."""
    mesh: str = ""
    """Devices along each axis, e.g. data=2,fsdp=4,expert=1: `data` copies the model, `fsdp` cuts parameters and
    optimizer state, `expert` spreads the routed experts. Empty: one device."""
    coordinator: str | None = None
    """Of a run of several processes, HOST:PORT of the first, given to each of them; `auto`: SLURM, Open MPI, Kubernetes
    or the TPU's own environment names it and the rest."""
    num_processes: int | None = None
    """How many processes there are; all see the same --run-dir and data."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    data_streams: int | None = None
    """Parts of the data that are read side by side, each into its own rows of a batch, which they decide. Default: one
    for each process, so that each reads its own."""

    peak_tflops: float | None = None
    """What one device reaches in matrix products, in TFLOP/s, to hold the speed against (MFU); default:
    measured at the start, in the run's precision."""
    log_every: int = 25
    eval_every: int = 100
    eval_samples: int = 100
    """Rows of the held-out part that an evaluation reads."""
    save_every: int = 200
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay. The one with the lowest evaluation loss stays beside them."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this stay too; 0: none."""
    strict: bool = False
    """Refuse to go on from an older checkpoint where the newest is damaged."""
    max_nonfinite: int = 10
    """After so many steps in a row whose loss or gradient is not finite the run stops. Such a step changes nothing."""
    replay: int | None = None
    """Train nothing: compute this step of the run again, and say where its first value that is not finite appears."""

    prompts: tuple[str, ...] = CODE_PROMPTS
    """Prompts that the trained model continues at the end."""
    sample_tokens: int = 96
    """New tokens for each of these prompts; 0 generates nothing."""
    temperature: float = 0.5
    top_p: float = 0.95

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(
            self, 1, "batch_size", "grad_accum", "steps", "log_every", "eval_every", "eval_samples",
            "save_every", "keep_checkpoints", "max_nonfinite",
        )  # fmt: skip
        _check_at_least(self, 2, "seq_len")
        _check_at_least(
            self, 0, "learning_rate", "warmup_steps", "weight_decay", "bias_update_rate",
            "balance_loss", "router_z_loss", "seed", "sample_tokens", "temperature", "keep_every",
        )  # fmt: skip
        if self.seq_len > self.model.max_position_embeddings:
            raise UserError(
                f"seq_len is {self.seq_len}: the position table has "
                f"max_position_embeddings = {self.model.max_position_embeddings} rows"
            )
        if self.replay is not None and self.replay < 1:
            raise UserError(f"replay is {self.replay}: it must be a step of the run, from 1")
        for name in ("max_grad_norm", "peak_tflops", "adam_eps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name} is {value}: it must be larger than 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must lie in [0, 1)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it must lie in (0, 1]")
        self._check_mesh()
        self._check_processes()

    def _check_processes(self) -> None:
        rest = (self.num_processes, self.process_id)
        if self.num_processes is not None and self.num_processes < 1:
            raise UserError(f"num_processes is {self.num_processes}: it must be at least 1")
        if self.coordinator == "auto" and rest != (None, None):
            raise UserError("coordinator is 'auto': leave out --num-processes and --process-id, which it finds too")
        if self.coordinator not in (None, "auto"):
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdecimal():
                raise UserError(f"coordinator is {shown(self.coordinator)}: it must be HOST:PORT or auto")
            if None in rest:
                raise UserError(
                    f"coordinator is {shown(self.coordinator)}: pass --num-processes and --process-id beside it"
                )
            if not 0 <= self.process_id < self.num_processes:
                raise UserError(f"process_id is {self.process_id}: it must lie in 0 to num_processes - 1")
        if self.coordinator is None and rest != (None, None):
            raise UserError("num_processes and process_id need --coordinator HOST:PORT beside them")
        if self.data_streams is not None and (self.data_streams < 1 or self.batch_size % self.data_streams):
            raise UserError(
                f"data_streams is {self.data_streams}: it must divide batch_size = {self.batch_size} "
                f"(sizes that do: {_divisors(self.batch_size)})"
            )

    def _check_mesh(self) -> None:
        sizes = self.mesh_sizes
        if sizes and self.parallel == "pmap":
            raise UserError(f"mesh is {shown(self.mesh)}: --parallel pmap has no mesh, leave out one of the two")
        devices = self.mesh_devices
        if self.batch_size % devices:
            raise UserError(
                f"mesh is {shown(self.mesh)}: its {devices} devices must divide batch_size = {self.batch_size}, "
                f"whose rows they share (sizes that do: {_divisors(self.batch_size)})"
            )
        common = math.gcd(self.model.hidden_size, self.model.num_attention_heads * self.model.rope_head_dim)
        if common % sizes.get("fsdp", 1):
            raise UserError(
                f"mesh is {shown(self.mesh)}: fsdp must divide hidden_size = {self.model.hidden_size} and half of it, "
                f"along which weights are cut (sizes that do: {_divisors(common)})"
            )

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """Devices along each axis that `mesh` names.

        Raises:
            UserError: it is not of that form.
        """
        sizes: dict[str, int] = {}
        for part in filter(None, self.mesh.split(",")):
            axis, _, size = part.partition("=")
            if axis not in AXES or axis in sizes or not re.fullmatch("[0-9]{1,9}", size) or int(size) < 1:
                raise UserError(
                    f"mesh is {shown(self.mesh)}: it must be AXIS=DEVICES,..., each axis of {', '.join(AXES)} at most "
                    "once"
                )
            sizes[axis] = int(size)
        return sizes

    @property
    def mesh_devices(self) -> int:
        """Devices of the mesh; 1 without one."""
        return math.prod(self.mesh_sizes.values())

    @property
    def folder(self) -> Path:
        return self.run_dir or Path("runs") / self.preset

    @property
    def tokens_per_step(self) -> int:
        return self.grad_accum * self.batch_size * self.seq_len

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        values["run_dir"] = None if self.run_dir is None else str(self.run_dir)
        values["prompts"] = list(self.prompts)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build from a mapping such as a run's train_config.json: the inverse of `to_dict`.

        Options that did not exist when it was written have their defaults.

        Raises:
            UserError: a key is unknown, the model is missing, or a value is out of its range.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - names):
            raise UserError(f"the training config has {listed(unknown)}, which this version does not know")
        model, prompts, run_dir = (values.get(name) for name in ("model", "prompts", "run_dir"))
        if not isinstance(model, Mapping):
            raise UserError(f"the training config's model is {shown(model)}: it must be an object")
        converted: dict[str, Any] = {"model": ModelConfig.from_dict(model)}
        if isinstance(prompts, list):
            converted["prompts"] = tuple(prompts)
        if isinstance(run_dir, str):
            converted["run_dir"] = Path(run_dir)
        return cls(**{**values, **converted})


# What a resumed run may change: how long it goes on, how it reports, and how it is computed. Everything
# else decides the numbers and must stay as it was.
RESUMABLE_FIELDS = frozenset(
    {
        "preset", "recipe", "run_dir", "overwrite", "steps", "log_every", "eval_every", "eval_samples", "save_every",
        "keep_checkpoints", "keep_every", "strict", "max_nonfinite", "replay", "prompts", "sample_tokens",
        "temperature", "top_p", "remat", "peak_tflops", "parallel", "mesh", "coordinator", "num_processes",
        "process_id",
    }
)  # fmt: skip


def changed_fields(saved: Mapping[str, Any], now: TrainConfig) -> list[tuple[str, Any, Any]]:
    """The fields (model fields as `model.NAME`) in which a saved `TrainConfig.to_dict()` forbids a resume."""
    current = now.to_dict()
    saved = {**saved, "model": saved["model"] if isinstance(saved.get("model"), Mapping) else {}}

    def flat(values: Mapping[str, Any]) -> dict[str, Any]:
        outer = {k: v for k, v in values.items() if k != "model" and k not in RESUMABLE_FIELDS}
        return outer | {f"model.{k}": v for k, v in values.get("model", {}).items()}

    before, after = flat(saved), flat(current)
    return [(k, before.get(k), after.get(k)) for k in sorted(before | after) if before.get(k) != after.get(k)]


def preset(name: str) -> ModelConfig:
    """Look a preset up by name.

    Raises:
        UserError: there is no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"preset is {shown(name)}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def recipe(name: str, preset_name: str) -> TrainConfig:
    """The training recipe `name` for a model preset.

    Raises:
        UserError: there is no such recipe or preset.
    """
    base = TrainConfig(preset=preset_name, model=preset(preset_name))
    if name == "default":
        return base
    if name == "seed":
        return dataclasses.replace(
            base,
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
