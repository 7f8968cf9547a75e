"""The self-check at the start of a run on a GPU: which kernels it must do without. Its result is kept if all pass.

A kernel that fails for a passing reason, such as memory that another program holds, is tried again at the next start.
"""

import contextlib
import hashlib
import json
from collections.abc import Collection
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxllm.config import KernelsOption, LoraConfig, ModelConfig
from jaxllm.errors import UserError, note
from jaxllm.files import cache_file, sha256_of, write_json
from jaxllm.model import kernels
from jaxllm.model.kernels import REPLACEABLE, choose_kernels
from jaxllm.model.kernels.self_check import Check, check_kernels, small_sizes
from jaxllm.run.hardware import versions
from jaxllm.run.processes import all_gather, is_primary


def kernels_to_avoid(
    config: ModelConfig, dtype: jnp.dtype, option: KernelsOption = "auto", lora: LoraConfig | None = None
) -> Collection[str]:
    """Of REPLACEABLE, the kernels that a model with this config, dtype and adapters must do without here.

    All processes of a run must call it.

    A kernel that fails in one process is avoided by all.

    Raises:
        UserError: the matrix product fails, of which there is no other form.
    """
    if option == "plain":
        return REPLACEABLE
    dtype = jnp.dtype(dtype)
    chosen = choose_kernels(config, dtype, lora=lora)
    plain = choose_kernels(config, dtype, lora=lora, without=REPLACEABLE)
    special = [name for name in REPLACEABLE if getattr(chosen, name) != getattr(plain, name)]
    if not special:
        return ()
    failed = all_gather(_failures(config, dtype, special, lora))
    about = ", ".join(f"{name} {version}" for name, version in versions().items())
    if "product" in failed:
        raise UserError(
            f"the matrix product of this device is wrong: {failed['product']} ({about}); repair the installation, or "
            "pass --kernels plain to train without this check"
        )
    for name, failure in failed.items():
        if is_primary():
            note(f"kernel `{name}` is replaced by its plain form: {failure} ({about})")
    return tuple(name for name in REPLACEABLE if name in failed)


def _failures(
    config: ModelConfig, dtype: jnp.dtype, special: Collection[str], lora: LoraConfig | None
) -> dict[str, str]:
    """Why each kernel fails that does, from this process's device or from facts about it."""
    file = cache_file("kernels", f"{_fingerprint(config, dtype, special, lora)}.json")
    if file is not None and file.is_file():
        return {}
    if is_primary():
        note("checking the kernels of this device, once for its driver and versions")
    checks = check_kernels(choose_kernels(config, dtype, lora=lora), config, dtype, special, lora)
    failed = failures(checks)
    if file is not None and not failed:
        with contextlib.suppress(OSError):  # it is checked again
            write_json(file, {"checks": [check._asdict() for check in checks]})
    return failed


def failures(checks: Collection[Check]) -> dict[str, str]:
    """The first failure of each kernel that fails."""
    found: dict[str, str] = {}
    for check in checks:
        if check.failure is not None:
            found.setdefault(check.kernel, check.failure)
    return found


def _fingerprint(config: ModelConfig, dtype: jnp.dtype, special: Collection[str], lora: LoraConfig | None) -> str:
    """Of all that decides the result: the device, the versions, the kernels' code and their sizes."""
    device, code = jax.local_devices()[0], Path(kernels.__file__).parent.glob("*.py")
    sources = [sha256_of(file) for file in sorted(code)]
    rank = lora.rank if lora and lora.adapts("experts") else 0
    decides = [device.device_kind, versions(), sources, small_sizes(config), dtype.name, sorted(special), rank]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()
