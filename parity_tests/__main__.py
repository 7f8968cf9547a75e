"""Run the parity ladder: check that both frameworks compute and train the same model.

python -m parity_tests                                      # random weights of `tiny`
python -m parity_tests RUN                                  # a training run
python -m parity_tests DIR                                  # an exported folder, or one of the DeepSeek family
python -m parity_tests --preset tiny-deepseek --seq-len 90  # against transformers' DeepseekV3ForCausalLM
python -m parity_tests --preset customllm-1b --layers 2 --rungs weights layers logits
python -m parity_tests --precision float64
python -m parity_tests --optimizer muon --rungs step trajectory
python -m parity_tests --mutate rope_halves_swapped         # plant a fault; a rung must catch it
python -m parity_tests pair my_pair.py                      # any pair of models; also `record` and `compare`
"""

import os
import sys
from collections.abc import Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # both frameworks on one device, else the comparison is between devices
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # PyTorch's waiting threads must not take the cores of JAX's

from jaxllm.command_line import parse
from jaxllm.errors import UserError, exit_on_user_error
from jaxllm.packages import check_own, is_installed
from parity_tests.engine.command import COMMANDS
from parity_tests.engine.command import main as compare_pair
from parity_tests.options import ParityArgs


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if given and given[0] in COMMANDS:  # which may need one framework alone
        return compare_pair(given)
    args: ParityArgs = parse(ParityArgs, argv, "python -m parity_tests", __doc__)
    check_own("convert", "torch_ref")
    if not is_installed("torch"):
        raise UserError("PyTorch is not installed, which is one of the two sides: pip install torch accelerate")
    from parity_tests.command import compare

    return compare(args)


if __name__ == "__main__":
    sys.exit(main())
