"""JAX's side of a hook: an identity primitive that carries a name through jit, vmap, remat, scan and differentiation.

The name is a static parameter of the primitive, so no transformation loses it. Differentiation adds a tap to the
tangent, and transposition turns that one into a tap of the cotangent: a program with gradients then has both, the
output of a module and the gradient there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from parity_tests.engine.order import output_name

Kind = Literal["output", "tangent", "gradient"]

tap_p = Primitive("tap")
tap_p.def_impl(lambda x, **_: x)
tap_p.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(tap_p, lambda ctx, x, **_: [x])


def _batch(args, dims, **params):
    (x,), (axis,) = args, dims
    return tap_p.bind(jnp.moveaxis(x, axis, 0), **params), 0  # rows first, as they stand in the other framework


def _jvp(primals, tangents, *, name: str, kind: Kind):
    (x,), (tangent,) = primals, tangents
    out = tap_p.bind(x, name=name, kind=kind)
    if type(tangent) is ad.Zero or kind != "output":
        return out, tangent
    return out, tap_p.bind(tangent, name=name, kind="tangent")


def _transpose(cotangent, x, *, name: str, kind: Kind):
    return [cotangent if type(cotangent) is ad.Zero else tap_p.bind(cotangent, name=name, kind="gradient")]


batching.primitive_batchers[tap_p] = _batch
ad.primitive_jvps[tap_p] = _jvp
ad.primitive_transposes[tap_p] = _transpose


def tap(x: Any, name: str) -> Any:
    """The same value; its floating-point arrays are recorded under a name (`name`, `name:1`, ...) where a side runs."""
    leaves, tree = jax.tree.flatten(x)
    tapped = 0
    for i, leaf in enumerate(leaves):
        if getattr(leaf, "ndim", 0) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            label = f"{name}:{tapped}" if tapped else name
            leaves[i] = tap_p.bind(jnp.asarray(leaf), name=label, kind="output")
            tapped += 1
    return jax.tree.unflatten(tree, leaves)


def tapped_class(cls: type, path: str, base: type) -> type:
    """A subclass whose public methods tap what they return under `path`.

    A class is static to every transformation, an attribute of an instance is not: equinox loses it at each flattening.

    Args:
        base: the framework's own class of modules, whose methods are left alone.
    """

    def wrap(method: Callable[..., Any], label: str) -> Callable[..., Any]:
        def call(self, *args, **kwargs):
            return tap(method(self, *args, **kwargs), label)

        return call

    methods: dict[str, Any] = {}
    of_base = {name for owner in base.__mro__ for name in vars(owner)}
    for owner in cls.__mro__:
        if owner is base or not issubclass(owner, base):
            continue
        for name, value in vars(owner).items():
            public = name == "__call__" or not name.startswith("_")
            if public and name not in methods and name not in of_base and _is_method(value):
                methods[name] = wrap(getattr(cls, name), output_name(path, name))
    if not methods:  # a part of the framework that is a module by its class alone, and may be asked for its exact class
        return cls
    return type(cls)(cls.__name__, (cls,), {"__module__": cls.__module__, "__annotations__": {}, **methods})


def _is_method(value: Any) -> bool:
    return (
        callable(value)
        and not isinstance(value, (staticmethod, classmethod, type))
        and (inspect.isfunction(value) or hasattr(value, "__wrapped__") or hasattr(value, "__get__"))
    )
