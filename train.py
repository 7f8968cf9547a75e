"""Train a CustomLLM. With no arguments: preset `tiny` on the standard library's source code, in minutes on a CPU.

python train.py                                         # train, or resume the last run
python train.py --preset customllm-1b --recipe seed     # the source's run
python train.py --help                                  # the options that most runs need; --help-all: every option
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flax import nnx

from jaxllm.config import TrainConfig
from jaxllm.config.train import NEEDS_INIT
from jaxllm.errors import UserError, exit_on_user_error
from jaxllm.model.decoding import Sampling, generate
from jaxllm.packages import check_own
from jaxllm.run.arguments import parse_args
from jaxllm.run.init import check_shapes
from jaxllm.run.processes import all_check, barrier, each_result, init_distributed, is_primary
from jaxllm.run.reporting import write_samples
from jaxllm.run.run import Run
from jaxllm.run.runtime import use_compilation_cache
from jaxllm.store.base import check_there
from jaxllm.store.folder import checkpoint_steps
from jaxllm.store.resume import check_folder
from jaxllm.store.source import model_folder
from jaxllm.train.placement import choose_placement
from jaxllm.train.trainer import Trainer

if TYPE_CHECKING:
    from convert.base import Base
    from convert.to_flax import Imported, Place


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    config = parse_args(argv, "train.py", __doc__, TrainConfig)
    init_distributed(config.mesh, config.options())
    use_compilation_cache()
    placement = choose_placement(config.mesh, config.data.batch_size)  # refused before the run's folder is touched
    with Run.open(config, placement, read_start) as (run, trainer, state):
        for batch in run.batches():
            state, metrics = trainer.step(state, batch.rows)
            run.add_step(batch, metrics)
            if run.log_due:
                run.log(metrics)
            if run.evaluation_due:
                run.evaluate(state)
            if run.finished:
                run.log_totals()
            if run.save_due:
                run.save(trainer, state)

        run.finish(trainer, state)
        weights = trainer.weights(state)
        del state  # free the optimizer state before sampling
        if is_primary():
            sample(run, trainer, *weights)
        barrier("end")
        print(f"\nEverything is in {run.config.folder}")


def read_start(config: TrainConfig, place: Place) -> Imported | Base | None:
    """What a run starts from with --init, or the base of its adapters: read, to its places, before any deletion."""
    if (init := config.init) is None:
        if config.adapters:
            raise UserError(NEEDS_INIT.format(config.lora.rank))
        return None
    resumes = check_folder(config.folder, "JAX", config.overwrite) and bool(checkpoint_steps(config.folder))
    if resumes and not config.adapters:
        return None
    if resumes:
        check_there(config.folder, model_folder(init))
    check_shapes(init, config.model)
    check_own("convert")
    if config.adapters:
        from convert.base import check_base, read_base

        if resumes:
            all_check(lambda: is_primary() and check_base(config.folder, model_folder(init)))
        adapter = None if resumes else config.adapter  # the checkpoint has what became of it
        hashed = is_primary() and not resumes
        return each_result(lambda: read_base(init, adapter, config.model, config.lora, place, hashed))
    from convert.to_flax import read_model

    return each_result(lambda: read_model(init, place=place))


def sample(run: Run, trainer: Trainer, params: Any, routing_bias: Any) -> None:
    """Continue the config's prompts with the trained model."""
    config = run.config

    def new_tokens(prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        model = nnx.merge(trainer.merged_graph, params, routing_bias)
        sampling = Sampling(temperature=config.sampling.temperature, top_p=config.sampling.top_p)
        eos = config.model.eos_token_ids
        return generate(model, prompts, max_new_tokens, sampling, seed=config.seed, eos_token_ids=eos)

    write_samples(config, run.tokenizer, new_tokens)


if __name__ == "__main__":
    sys.exit(main())
