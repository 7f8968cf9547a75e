"""optax beside torch.optim, as the smallest pair: equal gradients, and the updates are compared.

python -m parity_tests pair examples/parity/optimizers.py

Variants (VARIANT=...) that do not agree: `defaults` (the weight decay of AdamW is 1e-4 in optax, 1e-2 in PyTorch) and
`rmsprop` (optax adds eps inside the root by default).
"""

import os

import numpy as np

VARIANT = os.environ.get("VARIANT", "adamw")
x = np.random.default_rng(0).standard_normal((4, 6))


def jax():
    import jax.numpy as jnp
    import optax

    from parity_tests import FunctionSide

    optimizer = {
        "adamw": optax.adamw(1e-3, weight_decay=1e-2),
        "defaults": optax.adamw(1e-3),
        "nesterov": optax.sgd(1e-2, momentum=0.9, nesterov=True),
        "rmsprop": optax.rmsprop(1e-2, decay=0.9, eps=1e-8),
        "rmsprop_outside": optax.rmsprop(1e-2, decay=0.9, eps=1e-8, eps_in_sqrt=False),
    }[VARIANT]
    params = {"w": np.zeros((6, 5), np.float32), "b": np.zeros(5, np.float32)}
    return FunctionSide(lambda p: jnp.tanh(jnp.asarray(x, p["w"].dtype) @ p["w"] + p["b"]), params, optimizer=optimizer)


def torch():
    from torch import from_numpy, nn, optim, tanh

    from parity_tests import TorchSide

    def optimizer(m):
        if VARIANT.startswith("rmsprop"):
            return optim.RMSprop(m.parameters(), 1e-2, alpha=0.9, eps=1e-8)
        if VARIANT == "nesterov":
            return optim.SGD(m.parameters(), 1e-2, momentum=0.9, nesterov=True)
        return optim.AdamW(m.parameters(), 1e-3)

    return TorchSide(lambda: nn.Linear(6, 5), lambda m: tanh(m(from_numpy(x).to(m.weight.dtype))), optimizer=optimizer)


mapping = {"w": ("weight", "T"), "b": "bias"}
