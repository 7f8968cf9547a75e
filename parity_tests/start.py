"""`jaxllm-parity`: the commands for any pair, or the ladder, which needs both frameworks."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from parity_tests.engine.command import COMMANDS
from parity_tests.engine.command import main as compare_pair


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in COMMANDS:
        return compare_pair(given)
    from parity_tests.__main__ import main as climb

    return climb(given)
