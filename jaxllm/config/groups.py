"""The groups of options of a training run."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from jaxllm.config.fields import check_fields, option
from jaxllm.errors import UserError, shown

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


MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 1e4
"""Bounds of the sampling temperature, besides 0. Beyond them logits overflow float32, or sampling is uniform."""


def check_temperature(temperature: float) -> None:
    """Raise UserError if it lies between 0, which is greedy, and `MIN_TEMPERATURE`."""
    if 0 < temperature < MIN_TEMPERATURE:
        raise UserError(f"temperature is {temperature}: it must be 0 (greedy) or lie in [{MIN_TEMPERATURE}, 10000]")


class _Checked:
    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class DataConfig(_Checked):
    """The data, and how they are cut into batches."""

    source: Annotated[str, tyro.conf.arg(name="data")] = option("stdlib", resumable=True, common=True)
    """`stdlib` (the standard library's own source code), a file of text, JSONL, JSON, CSV, TSV, parquet or Arrow, a
    folder of them, or the name of a dataset on the Hugging Face Hub. Several with weights: A=0.7,B=0.3, shares of the
    text. A run can be resumed with the same content under another name."""
    subset: Annotated[str | None, tyro.conf.arg(name="data-config")] = None
    """Configuration of a Hub dataset."""
    split: Annotated[str, tyro.conf.arg(name="data-split")] = "train"
    """Split to train on, of a Hub dataset or of a folder whose file names give splits as on the Hub (train-*.parquet,
    test/...); `all` reads every file of a folder. If there is a validation split, the run is evaluated on it."""
    eval_data: str | None = option(None, resumable=True)
    """Text to evaluate on, in place of a held-out part: a file, a folder, or another split of --data."""
    hold_out: tyro.conf.Suppress[str | None] = option(None, resumable=True)
    """What the run holds out for evaluation, decided at its first start (`jaxllm.data.source.HoldOut`)."""
    revision: Annotated[str | None, tyro.conf.arg(name="data-revision")] = option(None, resumable=True)
    """Commit of a Hub dataset; default: the newest one when the run starts. The run records it; of files, it
    records their fingerprint."""
    skip_data: str = option("", resumable=True)
    """Files to leave out: names or patterns such as `part-3*`, separated by commas. A resumed run may add to it."""
    text_field: str = option("text", common=True)
    """Field of a row that holds the text, or a chat: messages for the tokenizer's chat template; `a.b` is the field b
    of the field a. Rows without a field `text` are read from `messages`."""
    tokenizer: str | None = option(None, common=True)
    """A Hub name or a folder; default: a byte-level BPE trained on the data."""
    special_tokens_in_text: Literal["text", "keep", "earlier"] = "text"
    """How special tokens in documents, messages and prompts are encoded: `text`, like other characters; `keep`, as
    control tokens, for data that rely on them. `earlier` resumes runs of versions without this option: control tokens,
    every 4,096 characters of a text file encoded separately, and rows of several passes mixed."""
    train_on: Literal["assistant", "all"] | None = option(None, common=True)
    """Which tokens are targets of the loss. `assistant`: of chats, what the assistant says and the token that ends it;
    of rows of a prompt and a completion, the completion. `all`: every token. Default: `assistant` where the rows are
    such; texts are trained on whole."""
    documents: Literal["joined", "separate"] | None = None
    """`joined`: documents follow one another in rows that are always full, and a token sees what comes before it in its
    row. `separate`: a row is filled with whole documents (longer ones are cut at the row), which do not see each other;
    the rest of it is padding. Default: `separate` where the rows are chats, or prompts with their completions."""
    seq_len: int = option(256, ge=2, common=True)
    """Tokens in a row of a batch."""
    batch_size: int = option(8, ge=1, le=2**20, common=True)
    """Rows in a micro-batch, over all devices."""
    grad_accum: int = option(1, ge=1, common=True)
    """Micro-batches in a step."""

    @property
    def has_targets(self) -> bool:
        """Whether the labels of a row differ from its tokens."""
        return self.train_on == "assistant" or self.documents == "separate"


JOINED_TEXTS = DataConfig()
"""Rows in which every token is a target."""


@dataclass(frozen=True)
class OptimConfig(_Checked):
    """The optimizer, and the terms of the loss."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """`adamw`, or `muon` for the matrices of the layers and AdamW for the rest, at the same learning rate and decay."""
    learning_rate: float = option(4e-3, ge=0, common=True)
    """Peak of the schedule."""
    weight_decay: float = option(0.1, ge=0)
    """Decoupled decay of the matrices; norms, biases and the routing bias have none."""
    beta1: float = option(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = option(0.95, ge=0, lt=1)
    """Decay of the second moment."""
    adam_eps: float = option(1e-8, gt=0)
    """Added to the root of the second moment."""
    muon_momentum: float = option(0.95, ge=0, lt=1)
    """Decay of Muon's momentum."""
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
    """The learning rate over the steps: linear warm-up, then down to 0 at `steps`."""

    steps: int = option(600, ge=1, resumable=True, common=True)
    """Optimizer steps."""
    epochs: float | None = option(None, gt=0, resumable=True, common=True)
    """Passes over the training part of the data, in place of --steps: all of it is read and encoded once before the
    first step, to count its rows. With several data streams, passes of the largest. Not for Hub datasets."""
    warmup_steps: int = option(50, ge=0)
    """Steps over which the learning rate rises from 0 to its peak."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up: half a cosine, or `wsd` (warm-up, stable, decay): the peak, then linear over `decay_steps`."""
    decay_steps: int | None = option(None, ge=1, resumable=True)
    """The last steps of a `wsd` run, over which the rate falls to 0; default: a fifth of `steps`. Until they begin, the
    rate does not depend on `steps`: a run that is resumed before them with more `steps` has the same numbers as one
    that had them from the start."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.decay_steps is None:
            return
        if self.schedule != "wsd":
            raise UserError(f"decay_steps is {self.decay_steps}: only --schedule wsd has a decay of its own")
        after_warmup = self.steps - self.warmup_steps
        if after_warmup < 1:
            raise UserError(
                f"warmup_steps is {self.warmup_steps}: it leaves none of the {self.steps} steps for decay_steps = "
                f"{self.decay_steps}; make it smaller, or steps larger"
            )
        if self.decay_steps > after_warmup:
            raise UserError(
                f"decay_steps is {self.decay_steps}: it must be at most {after_warmup}, the steps after warmup_steps"
            )

    @property
    def falling_steps(self) -> int:
        """Steps over which the learning rate falls to 0."""
        after_warmup = max(1, self.steps - self.warmup_steps)
        if self.schedule == "cosine":
            return after_warmup
        return min(self.decay_steps or max(1, self.steps // 5), after_warmup)


@dataclass(frozen=True)
class MeshConfig(_Checked):
    """Which devices compute a step, and which processes."""

    parallel: Literal["jit", "pmap"] = option("jit", resumable=True)
    """How a step runs: `jit` on one device or the --mesh, or `pmap` on all devices, each with a copy of the model."""
    axes: Annotated[str, tyro.conf.arg(name="mesh")] = option("", resumable=True, common=True)
    """Devices along each axis, e.g. data=2,fsdp=4,expert=1: `data` replicates the model, `fsdp` shards parameters and
    optimizer state, `expert` distributes the routed experts. Empty: one device."""
    coordinator: str | None = option(None, resumable=True, saved=False)
    """For a run of several processes: HOST:PORT of the first, the same for all of them; `auto`: detect it and the next
    two from SLURM, Open MPI, Kubernetes or the TPU's environment."""
    num_processes: int | None = option(None, ge=1, resumable=True, saved=False)
    """Number of processes; all need access to the same --run-dir and data."""
    process_id: int | None = option(None, resumable=True, saved=False)
    """Index of this process, from 0."""
    data_streams: int | None = option(None, ge=1, le=2**16)
    """Shards of the data that are read in parallel, each for its own rows of a batch. Default: one for each process,
    which then reads its own shard."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.sizes and self.parallel == "pmap":
            raise UserError(f"mesh is {shown(self.axes)}: --parallel pmap has no mesh, leave out one of the two")
        rest = (self.num_processes, self.process_id)
        if self.coordinator == "auto" and rest != (None, None):
            raise UserError("coordinator is 'auto': leave out --num-processes and --process-id, which are detected too")
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
        """Devices along each axis that `axes` names. Raises a UserError if it has another form."""
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

    save_every: int = option(200, ge=1, resumable=True, common=True)
    """Steps between two checkpoints."""
    keep_checkpoints: int = option(2, ge=1, resumable=True)
    """How many of the newest checkpoints are kept; train.py also keeps the one with the lowest evaluation loss."""


@dataclass(frozen=True)
class CheckpointConfig(SaveConfig):
    """Checkpoints and recovery of train.py."""

    keep_every: int = option(0, ge=0, resumable=True)
    """Also keep checkpoints whose step is a multiple of this; 0: none."""
    strict: bool = option(False, resumable=True, saved=False)
    """Refuse to resume from an older checkpoint where the newest is damaged."""
    max_nonfinite: int = option(10, ge=1, resumable=True)
    """Stop after this many consecutive steps with a loss or gradient that is not finite; they change nothing."""


@dataclass(frozen=True)
class LoggingConfig(_Checked):
    """What is measured and reported."""

    log_every: int = option(25, ge=1, resumable=True)
    """Steps between two lines of the log."""
    log_format: Literal["text", "dict"] = option("text", resumable=True)
    """Format of console lines: `text`, or `dict` with every value, as the source prints them."""
    log_to: Literal["none", "wandb", "trackio"] = option("none", resumable=True)
    """Send the log to Weights & Biases or trackio as well, through their own library."""
    eval_every: int = option(100, ge=1, resumable=True, common=True)
    """Steps between two evaluations."""
    eval_samples: int = option(100, ge=1, resumable=True)
    """Rows of the held-out part in an evaluation."""
    peak_tflops: float | None = option(None, gt=0, resumable=True)
    """TFLOP/s of one device in matrix products, the reference of the MFU. Default: its data sheet's, if jaxllm/devices
    has one, else measured at the start; in the run's precision."""


@dataclass(frozen=True)
class SamplingConfig(_Checked):
    """The samples at the end of a run."""

    prompts: tuple[str, ...] = option(CODE_PROMPTS, resumable=True)
    """Prompts that the trained model continues at the end of the run. Default: some code; of chats and of prompts with
    completions, what is asked in the part that is evaluated."""
    sample_tokens: int = option(96, ge=0, resumable=True)
    """New tokens for each of these prompts; 0 generates nothing."""
    temperature: float = option(0.5, ge=0, le=MAX_TEMPERATURE, resumable=True)
    """Divides the logits of the samples; 0 is greedy."""
    top_p: float = option(0.95, gt=0, le=1, resumable=True)
    """Sample from the most likely tokens whose probabilities together reach this value."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_temperature(self.temperature)
