"""Generic faults, planted in any PyTorch model: would the comparison have seen each of them?"""

from __future__ import annotations

import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from parity_tests.engine.planting import on_output, removed, with_attributes, with_values

Planted = AbstractContextManager[Any]


class Fault(NamedTuple):
    """A fault and how it is planted.

    Attributes:
        site: the context in which the model has it; None: this model cannot have it.
        training: it shows in training mode alone.
        optimizer: it is one of the optimizer, and the context is entered with that.
    """

    name: str
    site: Callable[[nn.Module], Callable[[Any], Planted] | None]
    training: bool = False
    optimizer: bool = False


FAULTS: list[Fault] = []


def _fault(name: str, **options: bool) -> Callable[[Any], Any]:
    def add(site: Any) -> Any:
        FAULTS.append(Fault(name, site, **options))
        return site

    return add


def _leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules with parameters and without submodules."""
    return [(n, m) for n, m in model.named_modules() if not [*m.children()] and [*m.parameters()]]


def _parameter(path: str, name: str = "weight") -> Callable[[nn.Module], torch.Tensor]:
    return lambda model: getattr(model.get_submodule(path), name)


def _of_class(model: nn.Module, pattern: str) -> list[str]:
    return [name for name, module in model.named_modules() if re.search(pattern, type(module).__name__, re.IGNORECASE)]


# weights


@_fault("a square weight transposed")
def _transposed(model: nn.Module) -> Any:
    for path, module in _leaves(model):
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.shape[0] == weight.shape[1] > 1:
            return lambda m: with_values([(_parameter(path)(m), lambda w: w.T)])
    return None


def _swapped(size: int, axis: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The first two blocks of an axis exchanged."""
    order = lambda n: torch.tensor([*range(size, 2 * size), *range(size), *range(2 * size, n)])  # noqa: E731
    return lambda w: w.index_select(axis, order(w.shape[axis]))


@_fault("two heads exchanged")
def _heads(model: nn.Module) -> Any:
    counts = ("num_heads", "num_attention_heads", "n_head", "n_heads", "nhead", "heads")
    for path, module in model.named_modules():
        holders = (module, getattr(module, "config", None))
        found = [getattr(holder, name) for holder in holders for name in counts if hasattr(holder, name)]
        heads = next((n for n in found if isinstance(n, int) and n > 1), None)
        if heads is None:
            continue
        for name, parameter in module.named_parameters():
            last = re.split(r"[._]", name.removesuffix(".weight"))
            if parameter.ndim != 2 or not {"q", "query", "wq", "qkv", "attn", "in"} & {*last}:
                continue
            owner = module.get_submodule(name.rpartition(".")[0])
            axis = 1 if type(owner).__name__ == "Conv1D" else 0
            joined = 3 if {"qkv", "attn", "in"} & {*last} else 1
            if parameter.shape[axis] % (joined * heads):
                continue
            size = parameter.shape[axis] // (joined * heads)
            full = f"{path}.{name}".strip(".")
            return lambda m: with_values([(m.get_parameter(full), _swapped(size, axis))])
    return None


@_fault("two experts exchanged")
def _experts(model: nn.Module) -> Any:
    for name, parameter in model.named_parameters():
        if "expert" in name and parameter.ndim >= 3 and parameter.shape[0] > 1:
            return lambda m: with_values([(m.get_parameter(name), _swapped(1, 0))])
    return _exchanged(model, lambda path: "expert" in path)


@_fault("two layers exchanged")
def _layers(model: nn.Module) -> Any:
    return _exchanged(model, lambda path: "expert" not in path)


def _exchanged(model: nn.Module, wanted: Callable[[str], bool]) -> Any:
    """Two neighbours in a list of modules, whose tensors have the same shapes."""
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not wanted(path):
            continue
        shapes = [{name: p.shape for name, p in child.named_parameters()} for child in module]
        for i, (one, other) in enumerate(itertools.pairwise(shapes)):
            if one and one == other:
                return functools.partial(_exchange, path=path, i=i)
    return None


def _exchange(model: nn.Module, path: str, i: int) -> Planted:
    children = [*model.get_submodule(path)][i : i + 2]
    one, other = ([p for _, p in child.named_parameters()] for child in children)
    before = {p: p.detach().clone() for p in (*one, *other)}
    partners = [*zip(one, other, strict=True), *zip(other, one, strict=True)]
    return with_values([(p, lambda _, partner=partner: before[partner]) for p, partner in partners])


@_fault("a bias left out")
def _bias(model: nn.Module) -> Any:
    names = [name for name, p in model.named_parameters() if name.endswith("bias") and p.ndim == 1]
    return (lambda m: with_values([(m.get_parameter(names[0]), torch.zeros_like)])) if names else None


# parts of the formula


def _eps(factor: float) -> Callable[[nn.Module], Any]:
    def site(model: nn.Module) -> Any:
        def found(m: nn.Module) -> list[tuple[Any, str, Any]]:
            return [
                (module, name, value * factor)
                for module in m.modules()
                for name, value in vars(module).items()
                if "eps" in name and isinstance(value, float) and value > 0
            ]

        return (lambda m: with_attributes(found(m))) if found(model) else None

    return site


FAULTS += [Fault("eps ten times larger", _eps(10.0)), Fault("eps 1 % larger", _eps(1.01))]


@_fault("a norm left out")
def _norm(model: nn.Module) -> Any:
    paths = [path for path in _of_class(model, r"norm") if [*model.get_submodule(path).parameters(recurse=False)]]
    if not paths:
        return None
    return lambda m: removed(m.get_submodule(paths[0]).register_forward_hook(on_output(lambda out, args: args[0])))


@_fault("rotary halves in the other convention")
def _halves(model: nn.Module) -> Any:
    homes = [sys.modules.get(type(module).__module__) for module in model.modules()]
    home = next((home for home in homes if hasattr(home, "rotate_half")), None)

    def interleaved(x: torch.Tensor) -> torch.Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    return None if home is None else lambda m: mock.patch.object(home, "rotate_half", interleaved)


@_fault("positions off by one")
def _positions(model: nn.Module) -> Any:
    rotary = _of_class(model, r"rotary|rope")
    if rotary:

        def shift(module: nn.Module, args: Any, kwargs: Any) -> Any:
            whole = lambda x: x + 1 if isinstance(x, torch.Tensor) and not x.is_floating_point() else x  # noqa: E731
            return tuple(map(whole, args)), {name: whole(x) for name, x in kwargs.items()}

        return lambda m: removed(m.get_submodule(rotary[0]).register_forward_pre_hook(shift, with_kwargs=True))
    learned = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and re.search(r"pos|wpe", path) and module.num_embeddings > 1
    ]
    if not learned:
        return None
    return lambda m: removed(
        m.get_submodule(learned[0]).register_forward_pre_hook(
            lambda module, args: ((args[0] + 1).clamp(max=module.num_embeddings - 1),)
        )
    )


class _FutureToken(TorchFunctionMode):
    """The first query sees the second key, wherever a softmax or an attention has masked it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "softmax" and args[0].ndim >= 3 and args[0].shape[-1] > 1 and args[0].shape[-2] > 1:
            scores = args[0]
            masked = scores[..., 0, 1] <= -1e4
            opened = torch.where(masked, scores[..., 0, 0], scores[..., 0, 1])
            first = torch.cat([scores[..., :1, :1], opened[..., None, None], scores[..., :1, 2:]], dim=-1)
            args = (torch.cat([first, scores[..., 1:, :]], dim=-2), *args[1:])
        if name == "scaled_dot_product_attention":
            query, key = args[0], args[1]
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            if kwargs.get("is_causal") and mask is None:
                mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
            if mask is not None and mask.shape[-1] > 1:
                mask = mask.clone()
                mask[..., 0, 1] = True if mask.dtype == torch.bool else 0.0
                args = args[:3]
                kwargs |= {"attn_mask": mask, "is_causal": False}
        return func(*args, **kwargs)


@_fault("one future token let through the mask")
def _future(model: nn.Module) -> Any:
    return lambda m: _FutureToken()


class _OtherGelu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") == "gelu":
            kwargs["approximate"] = "none" if kwargs.get("approximate") == "tanh" else "tanh"
        return func(*args, **kwargs)


@_fault("the other GELU")
def _gelu(model: nn.Module) -> Any:
    # transformers writes its tanh form out (`NewGELUActivation`); a call of `gelu` has an argument
    written = _of_class(model, r"^(New|Fast)?GELU|GELUTanh")
    if not written:
        return lambda m: _OtherGelu()
    module = model.get_submodule(written[0])
    is_tanh = re.search(r"^New|^Fast|Tanh", type(module).__name__) or getattr(module, "approximate", "") == "tanh"
    other = "none" if is_tanh else "tanh"
    swap = on_output(lambda out, args: nn.functional.gelu(args[0], approximate=other))
    return lambda m: removed(m.get_submodule(written[0]).register_forward_hook(swap))


def _middle(model: nn.Module) -> str:
    leaves = _leaves(model)
    return leaves[len(leaves) // 2][0]


def _scale(factor: float) -> Callable[[nn.Module], Any]:
    def site(model: nn.Module) -> Any:
        path = _middle(model)
        return lambda m: removed(m.get_submodule(path).register_forward_hook(on_output(lambda out, _: out * factor)))

    return site


FAULTS += [
    Fault("a scale of 1.001 at one module", _scale(1.001)),
    Fault("a scale of 1 + 1e-6 at one module", _scale(1 + 1e-6)),
]


@_fault("a gradient 0.1 % larger at one module")
def _gradient(model: nn.Module) -> Any:
    path = _middle(model)
    scaled = on_output(lambda out, _: out + 0.001 * (out - out.detach()))
    return lambda m: removed(m.get_submodule(path).register_forward_hook(scaled))


@_fault("dropout left on")
def _dropout(model: nn.Module) -> Any:
    paths = _of_class(model, r"^dropout")
    if not paths:
        return None

    @contextmanager
    def plant(m: nn.Module) -> Iterator[None]:
        changes = [(m.get_submodule(path), "p", m.get_submodule(path).p or 0.1) for path in paths]
        with with_attributes(changes):
            for module, _, _ in changes:
                module.train()
            try:
                yield
            finally:
                for module, _, _ in changes:
                    module.eval()

    return plant


@_fault("the padding row's gradient kept")
def _padding(model: nn.Module) -> Any:
    paths = [p for p, module in model.named_modules() if getattr(module, "padding_idx", None) is not None]
    if not paths:
        return None
    return lambda m: with_attributes([(m.get_submodule(paths[0]), "padding_idx", None)])


# state and training


@_fault("another momentum of the running statistics", training=True)
def _momentum(model: nn.Module) -> Any:
    def found(m: nn.Module) -> list[tuple[Any, str, Any]]:
        return [
            (module, "momentum", module.momentum * 0.9) for module in m.modules() if getattr(module, "momentum", None)
        ]

    return (lambda m: with_attributes(found(m))) if found(model) else None


@_fault("an eps inside the root of the optimizer", optimizer=True)
def _eps_inside(model: nn.Module) -> Any:
    @contextmanager
    def plant(optimizer: torch.optim.Optimizer) -> Iterator[None]:
        step = optimizer.step

        def wrong() -> None:
            before = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}
            step()
            with torch.no_grad():
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        state, eps = optimizer.state.get(p, {}), group.get("eps")
                        if not {"exp_avg_sq", "step"} <= state.keys() or eps is None:
                            continue
                        nu = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
                        kept = before[p] * (1 - group["lr"] * group["weight_decay"])
                        p.copy_(kept + (p - kept) * (nu.sqrt() + eps) / (nu + eps).sqrt())

        optimizer.step = wrong  # type: ignore[method-assign]
        try:
            yield
        finally:
            optimizer.step = step  # type: ignore[method-assign]

    return plant


def _groups(change: Callable[[dict[str, Any], Any], None]) -> Callable[[nn.Module], Any]:
    """Each parameter in a group of its own, with other options."""

    def site(model: nn.Module) -> Any:
        @contextmanager
        def plant(optimizer: torch.optim.Optimizer) -> Iterator[None]:
            before = optimizer.param_groups
            groups = [{**group, "params": [p]} for group in before for p in group["params"]]
            for group in groups:
                change(group, group["params"][0])
            optimizer.param_groups = groups
            try:
                yield
            finally:
                optimizer.param_groups = before

        return plant

    return site


def _decay_of_vectors(group: dict[str, Any], parameter: torch.Tensor) -> None:
    if parameter.ndim <= 1 and "weight_decay" in group:
        group["weight_decay"] = 0.0 if group["weight_decay"] else 0.01


def _faster(group: dict[str, Any], parameter: torch.Tensor) -> None:
    group["lr"] = group["lr"] * 1.01


FAULTS += [
    Fault("another weight decay of biases and norms", _groups(_decay_of_vectors), optimizer=True),
    Fault("a learning rate 1 % larger", _groups(_faster), optimizer=True),
]
