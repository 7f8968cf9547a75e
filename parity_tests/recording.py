"""Record what the modules of a PyTorch model return."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def recorded(modules: Sequence[tuple[nn.Module, str]]) -> Iterator[dict[str, list[Any]]]:
    """In this context, for each part the outputs of its modules, in the order of the calls.

    Args:
        modules: each module with the name of its part.
    """
    made: dict[str, list[Any]] = {part: [] for _, part in modules}
    handles = []
    for module, part in modules:

        def keep(module, args, output, part=part):
            made[part].append(output)

        handles.append(module.register_forward_hook(keep))
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def first(output: Any) -> Any:
    """The output itself, or the first of several."""
    return output[0] if isinstance(output, tuple) else output
