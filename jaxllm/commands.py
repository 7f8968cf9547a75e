"""The installed commands whose modules lie outside this package, where a user's module of that name may hide them."""

import importlib
from collections.abc import Callable

from jaxllm.errors import exit_on_user_error
from jaxllm.packages import check_own


def _command(package: str, module: str) -> Callable[[], int]:
    @exit_on_user_error
    def main() -> int:
        check_own(package)
        return importlib.import_module(module).main()

    return main


train = _command("train", "train")
convert = _command("convert", "convert.__main__")
parity = _command("parity_tests", "parity_tests.__main__")
