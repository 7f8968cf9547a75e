"""Convert between a run of this project and a folder that PyTorch people know.

python -m convert to-torch RUN OUT [--dtype bfloat16]
python -m convert to-torch RUN OUT --merge                   # of a run with adapters: the whole model
python -m convert to-torch RUN TORCH_RUN --training          # to resume with python -m torch_ref.train
python -m convert to-flax DIR RUN
python -m convert to-flax TORCH_RUN RUN                       # to resume with train.py
python -m convert to-flax state_dict.safetensors RUN --preset customllm-1b
python -m convert to-flax DEEPSEEK_DIR RUN --layers 4          # a piece of a large model
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # only moves bytes: no accelerator's memory is needed

from convert.base import export_adapter
from convert.to_flax import import_run
from convert.to_torch import MODELING_FILE, export_run
from convert.training import export_training, import_training, is_pytorch_run
from jaxllm.command_line import parse
from jaxllm.config import preset
from jaxllm.errors import UserError, exit_on_user_error
from jaxllm.run.runtime import start_jax
from jaxllm.store.folder import adapters_of


@dataclass(frozen=True)
class ToTorch:
    """Export the newest weights of a run as a transformers folder, or the run itself to resume in PyTorch."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    out: Annotated[Path, tyro.conf.Positional]
    """A new folder."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the written weights; none: that of the folder that the run was made from, or float32."""
    training: bool = False
    """Hand over the run: moments, step count and data position too, for python -m torch_ref.train."""
    merge: bool = False
    """Of a run with adapters (--lora-rank): write the model with its adapters merged, in place of a folder for PEFT."""
    drop_mtp: bool = False
    """Leave out the layers of multi-token prediction, which are else the source's, untrained."""

    def __post_init__(self) -> None:
        if self.training and self.dtype not in (None, "float32"):
            raise UserError(f"dtype is {self.dtype!r}: a run to train on is handed over in float32; leave out --dtype")
        adapted = adapters_of(self.run) is not None
        if self.training and adapted:
            raise UserError(
                f"training is set: {str(self.run)!r} trains adapters, which python -m torch_ref.train does not: "
                "pass --merge in its place"
            )
        if self.merge and not adapted:
            raise UserError(f"merge is set: {str(self.run)!r} has no adapters, leave it out")
        if adapted and not self.merge and (self.dtype is not None or self.drop_mtp):
            raise UserError("dtype and drop_mtp are for a whole model: adapters are written alone, pass --merge")
        if self.training and self.drop_mtp:
            raise UserError("drop_mtp is set: a run to train on has no multi-token prediction, leave it out")


@dataclass(frozen=True)
class ToFlax:
    """Make a run from a transformers folder, a state_dict file (.safetensors, .bin, .pt) or a PyTorch run."""

    source: Annotated[Path, tyro.conf.Positional]
    """What is converted; also the Hub name of a model that is in the Hub's cache."""
    run: Annotated[Path, tyro.conf.Positional]
    """A new folder."""
    preset: str | None = None
    """The model's shape, if there is no config.json next to the weights."""
    layers: int | None = None
    """Only this many of the first layers."""


Command = Annotated[ToTorch, tyro.conf.subcommand("to-torch")] | Annotated[ToFlax, tyro.conf.subcommand("to-flax")]


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    command: ToTorch | ToFlax = parse(Command, argv, "python -m convert", __doc__)
    start_jax()
    if isinstance(command, ToTorch) and command.training:
        export_training(command.run, command.out)
        print(f"Wrote {command.out}: python -m torch_ref.train --run-dir {command.out} resumes it")
    elif isinstance(command, ToTorch) and adapters_of(command.run) and not command.merge:
        export_adapter(command.run, command.out)
        print(f"Wrote {command.out}: PeftModel.from_pretrained(MODEL, {str(command.out)!r})")
    elif isinstance(command, ToTorch):
        export_run(command.run, command.out, dtype=command.dtype, drop_mtp=command.drop_mtp)
        code = ", trust_remote_code=True" if (command.out / MODELING_FILE).exists() else ""
        print(f"Wrote {command.out}: AutoModelForCausalLM.from_pretrained({str(command.out)!r}{code})")
    elif is_pytorch_run(command.source):
        if command.preset is not None:
            raise UserError(f"preset is {command.preset!r}: a PyTorch run has its own config, leave it out")
        if command.layers is not None:
            raise UserError(f"layers is {command.layers}: a PyTorch run is taken whole, leave it out")
        import_training(command.source, command.run)
        print(f"Wrote {command.run}: python train.py --run-dir {command.run} resumes it")
    else:
        config = None if command.preset is None else preset(command.preset)
        if config is not None and command.layers is not None:
            raise UserError(f"layers is {command.layers}: it needs the config.json of a folder, leave out --preset")
        import_run(command.source, command.run, config, command.layers)
        print(f"Wrote {command.run}: python -m jaxllm.generate {command.run}")


if __name__ == "__main__":
    sys.exit(main())
