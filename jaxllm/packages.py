"""Which packages Python finds: a library, or a folder of that name; this project's, or a user's that hides it."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from jaxllm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
"""Holds this project's top-level packages and `train.py`, in a checkout and where it is installed."""


def is_installed(name: str) -> bool:
    """Whether a library can be imported. A folder of its name, such as `wandb/` with logs, is not the library.

    Python finds a folder without `__init__.py` too: as a package without an origin.
    """
    spec = importlib.util.find_spec(name)
    return spec is not None and (spec.origin is not None or spec.submodule_search_locations is None)


def version_of(package: str) -> str | None:
    """The version of a library; None: it is not installed, or is a checkout without metadata."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_own(*names: str) -> None:
    """Raise a UserError if a user's file or folder hides this project's packages of these names. Call it before they
    are imported."""
    for name in names:
        spec = getattr(sys.modules.get(name), "__spec__", None) or importlib.util.find_spec(name)
        if spec is None:
            raise UserError(f"the package {name} is missing from {ROOT}: install the whole project again")
        found = Path(spec.origin or next(iter(spec.submodule_search_locations or [name]))).resolve()
        if found not in (ROOT / name / "__init__.py", ROOT / f"{name}.py"):
            hides = found.parent if found.name == "__init__.py" else found
            raise UserError(
                f"{hides} hides this project's {name!r}, which is needed here: rename it, or work in another folder"
            )
