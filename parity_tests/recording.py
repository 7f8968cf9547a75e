"""Record what the modules of a PyTorch model return."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def hooked(modules: Iterable[tuple[nn.Module, str]], keep: Callable[[str, Any], None]) -> Iterator[None]:
    """In this context, `keep(name, output)` is called after each call of a module.

    Args:
        modules: each module with its name.
    """
    handles = [
        module.register_forward_hook(lambda _module, _args, output, name=name: keep(name, output))
        for module, name in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded(modules: Sequence[tuple[nn.Module, str]]) -> Iterator[dict[str, list[Any]]]:
    """In this context, for each part the outputs of its modules, in the order of the calls."""
    made: dict[str, list[Any]] = {part: [] for _, part in modules}
    with hooked(modules, lambda part, output: made[part].append(output)):
        yield made


def first(output: Any) -> Any:
    """The output itself, or the first of several."""
    return output[0] if isinstance(output, tuple) else output
