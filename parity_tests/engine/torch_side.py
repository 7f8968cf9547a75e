"""A side in PyTorch: a function that makes a model, and one that calls it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxllm.errors import UserError
from parity_tests.engine.order import ROOT, numbered, ordered_modules, path_of
from parity_tests.engine.record import Module, Named, Run, Trained, storable
from parity_tests.engine.side import (
    LEARNING_RATE,
    STEPS,
    WEIGHT_DECAY,
    Precision,
    check_results,
    hashed,
    projection,
    signs,
)

if TYPE_CHECKING:
    from torch import nn

Plant = Callable[["nn.Module"], contextlib.AbstractContextManager]
"""A fault: in its context the model is wrong."""


class TorchSide:
    """A model in PyTorch. PyTorch is imported when the side is used, not when it is written down.

    A model is made anew for each precision: `.double()` would keep the tables that a constructor computed in float32.
    """

    framework = "torch"

    def __init__(
        self,
        make: Callable[[], Any],
        call: Callable[[Any], Any],
        train_call: Callable[[Any], Any] | None = None,
        *,
        loss: Callable[[Any], Any] | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        logits: Callable[..., Any] | None = None,
        variants: Mapping[str, Callable[..., Any]] | None = None,
        seed: int = 0,
    ):
        """
        Args:
            make: makes the module.
            call: what is compared, a function of the module.
            train_call: the same in training mode; none: `call` after `module.train()`.
            loss: of what the call returns, a scalar; none: a fixed random projection.
            optimizer: a function of the module that makes a torch.optim optimizer; none: AdamW.
            logits: a function (module, ids) or (module, ids, mask) for the rung `batch`.
            variants: further functions (module, ids) that must give the same logits: with a cache, packed, in chunks.
            seed: set before each `make`.
        """
        self.make, self.call, self.train_call = make, call, train_call
        self.loss, self.optimizer, self.logits, self.seed = loss, optimizer, logits, seed
        self.variants = dict(variants or {})
        self._models: dict[str, Any] = {}
        self._loaded: list[str] = []
        self._order: list[str] = []
        self._inputs: list[str] = []

    # what it consists of

    def tensors(self) -> dict[str, np.ndarray]:
        """Views of the model in its own precision."""
        return {name: storable(_numpy(x)) for name, x in _names(self.model("own"))[0].items()}

    def load(self, values: Named) -> None:
        import torch

        tensors = _names(self.model("own"))[0]
        with torch.no_grad():
            for name in values:
                tensors[name].copy_(torch.from_numpy(np.ascontiguousarray(values[name])))
        self._loaded = list(values)

    @contextmanager
    def nudged(self, direction: int) -> Iterator[None]:
        import torch

        parameters = {name: p for name, p in self.model("own").named_parameters() if p.is_floating_point()}

        def move(way: float) -> None:
            with torch.no_grad():
                for name, p in parameters.items():
                    towards = torch.from_numpy(signs(name, tuple(p.shape), direction)).to(p.dtype) * way
                    p.copy_(torch.nextafter(p, towards))

        move(np.inf)
        try:
            yield
        finally:
            move(-np.inf)  # the neighbour's neighbour is the value itself

    def trainable(self) -> list[str]:
        return [name for name, p in self.model("own").named_parameters() if p.is_floating_point() and p.requires_grad]

    def movable(self) -> list[str]:
        """Parameters and running statistics; other buffers are tables that a formula made."""
        found = set(self.trainable())
        return [name for name in self.tensors() if name in found or name.rpartition(".")[2].startswith("running_")]

    def aliases(self) -> dict[str, str]:
        return _names(self.model("own"))[1]

    def modules(self) -> list[Module]:
        model = self.model("own")
        if not self._order:
            self.run("own", grads=False)
        kinds = {path: type(module).__name__ for path, module in model.named_modules()}
        return ordered_modules(self._order, list(self.tensors()), lambda name: name.rpartition(".")[0], kinds)

    def can_train(self) -> bool:
        return True

    def about(self) -> dict[str, Any]:
        model = self.model("own")
        if not self._order:
            self.run("own", grads=False)
        return {
            "versions": {name: _version(name) for name in ("torch", "transformers", "numpy")},
            "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}),
            "inputs": sorted(set(self._inputs)),
            "device": "cpu",
            "aliases": self.aliases(),
        }

    def modules_between(self, before: str | None, after: str) -> list[str]:
        """Modules without parameters that ran between two outputs, each with its class."""
        model = self.model("own")
        start = self._order.index(before) + 1 if before in self._order else 0
        end = self._order.index(after) if after in self._order else start
        found = {}
        for key in self._order[start:end]:
            module = model.get_submodule(path_of(key))
            if not any(True for _ in module.parameters()):
                found[path_of(key)] = f"{path_of(key)} ({type(module).__name__})"
        return list(found.values())

    # running it

    def model(self, precision: Precision) -> Any:
        """The model, made in a precision, without the loaded weights at first."""
        import torch

        if precision not in self._models:
            torch.manual_seed(self.seed)
            if precision == "own":
                model = self.make()
            else:
                with self._lifting(precision):
                    model = self.make()
                model = model.double()
            if not isinstance(model, torch.nn.Module):
                raise UserError(f"make returned a {type(model).__name__}: it must make a torch.nn.Module")
            self._models[precision] = model.eval()
            if not _names(model)[0]:
                raise UserError("the PyTorch model has no floating-point parameter: there is nothing to map")
        model = self._models[precision]
        if precision == "lifted":
            own, tensors = _names(self._models["own"])[0], _names(model)[0]
            with torch.no_grad():
                for name in self._loaded:
                    tensors[name].copy_(own[name])
        return model

    def run(
        self, precision: Precision, *, training: bool = False, grads: bool = True, plant: Plant | None = None
    ) -> Run:
        import torch
        from torch.utils._pytree import tree_leaves

        from parity_tests.recording import hooked

        model = self.model(precision)
        run, kept, recording = Run(0.0), {}, True
        outputs: dict[str, Any] = {}
        calls: dict[str, int] = {}

        def keep(name: str, output: Any) -> None:
            if not recording:
                return  # a checkpointed module, called again by the backward pass
            lifting.module = name
            leaves = [
                x for x in tree_leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim
            ]
            for i, x in enumerate(leaves):
                label = f"{name or ROOT}:{i}" if i else name or ROOT
                calls[label] = calls.get(label, -1) + 1
                key = numbered(label, calls[label])
                outputs[key] = storable(_numpy(x)).copy()
                if grads and x.requires_grad:
                    x.retain_grad()
                    kept[key] = x

        with ExitStack() as stack:
            lifting = stack.enter_context(self._lifting(precision))
            if plant is not None:
                stack.enter_context(plant(model))
            stack.enter_context(self._mode(model, training))
            stack.enter_context(self._noted_inputs(model))
            stack.enter_context(hooked([(module, name) for name, module in model.named_modules()], keep))
            if not grads:
                stack.enter_context(torch.no_grad())
            torch.manual_seed(self.seed)
            result = self._called(model, training)
            results = _float_leaves(result)
            check_results(results, self.framework)
            loss = self._loss(result, results)
            recording = False
            if grads:
                loss.backward()
            run.loss = float(loss.detach())
            run.results = {name: storable(_numpy(x)) for name, x in results.items()}
            run.outputs = outputs
            run.output_grads = {key: storable(_numpy(x.grad)) for key, x in kept.items() if x.grad is not None}
            run.grads = {name: storable(_numpy(p.grad)) for name, p in model.named_parameters() if p.grad is not None}
            trainable = {name for name, _ in model.named_parameters()}
            run.state = {
                name: storable(_numpy(x)).copy() for name, x in _names(model)[0].items() if name not in trainable
            }
            run.findings = list(getattr(lifting, "findings", []))
        if precision == "own" and not training and plant is None:
            self._order = list(outputs)
        model.zero_grad(set_to_none=True)
        return run

    def train(
        self,
        precision: Precision,
        steps: int = STEPS,
        training: bool = False,
        plant: Plant | None = None,
        optimizer_plant: Callable[[Any], Any] | None = None,
    ) -> Trained:
        import torch

        model = self.model(precision)
        losses, first = [], {}
        before = {name: _numpy(p).copy() for name, p in model.named_parameters()}

        def change() -> dict[str, np.ndarray]:
            return {name: np.asarray(_numpy(p) - before[name], np.float64) for name, p in model.named_parameters()}

        with ExitStack() as stack:
            stack.enter_context(self._lifting(precision))
            if plant is not None:
                stack.enter_context(plant(model))
            stack.enter_context(self._mode(model, training))
            optimizer = self._optimizer(model)
            if optimizer_plant is not None:
                stack.enter_context(optimizer_plant(optimizer))
            for i in range(steps):
                optimizer.zero_grad(set_to_none=True)
                result = self._called(model, training)
                loss = self._loss(result, _float_leaves(result))
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
                if not i:
                    first = change()
            last = change()
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.from_numpy(before[name]))
        return Trained(losses, first, last)

    def call_logits(
        self, precision: Precision, ids: np.ndarray, mask: np.ndarray | None = None, logits: Any = None
    ) -> np.ndarray:
        import torch

        model = self.model(precision)
        arguments = [torch.from_numpy(np.asarray(ids, np.int64))]
        if mask is not None:
            arguments.append(torch.from_numpy(mask.astype(np.int64)))
        with self._lifting(precision), torch.no_grad():
            return storable(_numpy((logits or self.logits)(model, *arguments)))

    def _called(self, model: Any, training: bool) -> Any:
        return (self.train_call if training and self.train_call else self.call)(model)

    @contextmanager
    def _lifting(self, precision: Precision) -> Iterator[Any]:
        from parity_tests.engine.torch_lift import Lifted, default_float64

        if precision == "own":
            yield Lifted()  # not entered: a place for the name of the module
            return
        with default_float64(), Lifted(self._low()) as lifted:
            yield lifted

    def _low(self) -> bool:
        own = self._models.get("own")
        return own is not None and any(p.element_size() < 4 for p in own.parameters() if p.is_floating_point())

    @contextmanager
    def _mode(self, model: Any, training: bool) -> Iterator[None]:
        """Training mode if requested; the buffers are restored afterwards."""
        import torch

        before = [(x, x.detach().clone()) for x in model.buffers()] if training else []
        if training:
            model.train()
        try:
            yield
        finally:
            model.eval()
            with torch.no_grad():
                for x, values in before:
                    x.copy_(values)

    @contextmanager
    def _noted_inputs(self, model: Any) -> Iterator[None]:
        import torch
        from torch.utils._pytree import tree_leaves

        def note(_module: Any, args: Any, kwargs: Any) -> None:
            arrays = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self._inputs = [hashed(storable(_numpy(x)) if x.is_floating_point() else _numpy(x)) for x in arrays]

        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _loss(self, result: Any, results: dict[str, Any]) -> Any:
        import torch

        if self.loss is not None:
            return self.loss(result)
        total: Any = 0.0
        for i, values in enumerate(results.values()):
            wide = values if values.element_size() >= 4 else values.float()
            total = total + (wide * torch.from_numpy(projection(tuple(values.shape), i)).to(wide.dtype)).sum()
        return total

    def _optimizer(self, model: Any) -> Any:
        if self.optimizer is not None:
            return self.optimizer(model)
        import torch

        return torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def _names(model: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Floating-point tensors by their first name, and the further names of those that have several."""
    tensors: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    seen: dict[int, str] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *((name, x) for name, x in model.named_buffers(remove_duplicate=False) if x is not None),
    ]:
        if not tensor.is_floating_point():
            continue
        if id(tensor) in seen:
            aliases[name] = seen[id(tensor)]
        else:
            seen[id(tensor)] = name
            tensors[name] = tensor
    return tensors, aliases


def _float_leaves(result: Any) -> dict[str, Any]:
    import torch
    from torch.utils._pytree import tree_leaves

    floats = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return {f"result:{i}" if i else "result": x for i, x in enumerate(floats)}


def _numpy(x: Any) -> np.ndarray:
    import torch

    x = x.detach().cpu()
    return (torch.Tensor.float(x) if x.element_size() < 4 and x.is_floating_point() else x).numpy()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
