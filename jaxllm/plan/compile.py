"""Compile the training step for a device that you do not have, and read the program.

python -m jaxllm.plan.compile REQUEST.json REPLY.json is the separate process in which `jaxllm.plan` compiles, with an
environment that hides the devices of this machine.
"""

import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from jaxllm.config import TrainConfig
from jaxllm.config.groups import MeshConfig
from jaxllm.devices import Target
from jaxllm.files import read_json, write_json
from jaxllm.model.kernels import ANY, CUDA
from jaxllm.model.numerics import pin_numerics
from jaxllm.plan.hlo import read_program
from jaxllm.plan.hlo_cost import collectives, kernels, matrix_products
from jaxllm.train.computation import Computation
from jaxllm.train.placement import lower_step
from jaxllm.train.sharding import make_mesh

OUT_OF_MEMORY = "Ran out of memory"
"""XLA's message for a program that does not fit, which a TPU's compiler checks."""


def topology_devices(target: Target, devices: int) -> list[Any]:
    """This many described devices of one node."""
    if target.platform == "cuda":
        options = {"topology": f"1x1x{devices}", "target_config": target.config}
        described = topologies.get_topology_desc(platform="cuda", topology_name=target.name, **options)
    else:
        described = topologies.get_topology_desc(platform="tpu", topology_name=target.topology or "")
    return list(described.devices[:devices])


def measure(computation: Computation, mesh: MeshConfig, target: Target) -> dict[str, Any]:
    """Compile the real training step for as many described devices as the mesh has, and read the program.

    Returns the memory in bytes of each device, and the program's kernels, products and collectives.
    """
    start = time.perf_counter()
    layout = make_mesh(topology_devices(target, mesh.devices), **mesh.sizes)
    try:
        compiled: Any = lower_step(computation, layout).compile()
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY in str(error):
            return {"out_of_memory": str(error).splitlines()[0]}
        raise
    memory, program = compiled.memory_analysis(), read_program(compiled.as_text())
    return {
        "compile_seconds": time.perf_counter() - start,
        "jax": jax.__version__,
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "program": memory.generated_code_size_in_bytes,
        },
        "products": list(matrix_products(program)),
        "kernels": kernels(program),
        "collectives": collectives(program),
        "unknown_loops": program.unknown_loops(),
    }


def main(argv: list[str]) -> None:
    pin_numerics()
    request = read_json(Path(argv[0]))
    config, target = TrainConfig.from_dict(request["config"]), Target(**request["target"])
    computation = Computation.of(config, CUDA if target.compute_capability >= 8 else ANY)
    write_json(Path(argv[1]), measure(computation, config.mesh, target))


if __name__ == "__main__":
    main(sys.argv[1:])
