"""The folder of an adapter that PEFT wrote or reads, as its options. Imports neither JAX nor PyTorch."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from jaxllm.config.lora import TARGETS
from jaxllm.errors import UserError, note, one_line, shown
from jaxllm.files import StrPath, read_json
from jaxllm.store.folder import ADAPTER_CONFIG, is_run

ADAPTER_WEIGHTS = "adapter_model.safetensors"

_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None), "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []), "lora_bias": (False, None), "layer_replication": (None,),
    "alora_invocation_tokens": (None,), "trainable_token_indices": (None,),
    "rank_pattern": ({}, None), "alpha_pattern": ({}, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
    **dict.fromkeys(("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
                    (None, False)),
}  # fmt: skip
"""What an adapter must be: a low-rank one of matrices alone, of one rank and one scale, that keeps the base's weights.
PEFT changes them where an adapter begins as a part of them (`init_lora_weights`: pissa, olora, corda, loftq)."""

_PLACES = {"attention": ".self_attn.", "shared": ".shared_experts.", "experts": "experts.", "dense": ".mlp."}
"""What the name of a tensor has in it, in the order in which they are looked for."""


def adapter_options(folder: StrPath) -> dict[str, Any]:
    """The options of a run that goes on with an adapter: rank, scale and matrices.

    Raises:
        UserError: the folder holds none, or one of another kind.
    """
    file, weights = Path(folder) / ADAPTER_CONFIG, Path(folder) / ADAPTER_WEIGHTS
    if is_run(folder):
        raise UserError(
            f"adapter is {str(folder)!r}: that is a run; resume it with --run-dir, or name the folder that "
            f"`python -m convert to-torch {folder} OUT` writes"
        )
    for needed in (file, weights):
        if not needed.is_file():
            raise UserError(f"adapter is {str(folder)!r}: the folder holds no {needed.name}, as PEFT writes it")
    values = read_json(file)
    for key, allowed in _PLAIN.items():
        if values.get(key, allowed[0]) not in allowed:
            must = " or ".join(str(choice) for choice in allowed)
            raise UserError(f"{file}: {key} is {shown(values[key])}: it must be {must}")
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(
            f"{file}: r is {shown(rank)} and lora_alpha is {shown(alpha)}: r must be an integer of at least 1, and "
            "lora_alpha a number"
        )
    if dropout := values.get("lora_dropout"):
        note(f"{file}: lora_dropout is {shown(dropout)}: the adapter is trained on without dropout")
    try:
        with safe_open(weights, "numpy") as opened:
            names = list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights} is not a complete safetensors file ({one_line(error)}): copy it again") from None
    targets = {next((target for target, place in _PLACES.items() if place in name), None) for name in names} - {None}
    return {
        "lora_rank": rank,
        "lora_alpha": float(alpha),
        "lora_rslora": bool(values.get("use_rslora")),
        "lora_targets": ",".join(target for target in TARGETS if target in targets),
    }
