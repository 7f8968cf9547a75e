"""Retries of requests to the Hub: which errors are transient, how long to wait, and one line for each retry.

There are two loops. The Hub's client repeats a request up to five times in about half a minute, or when the server's
Retry-After says; `report_client_retries` prints these. When it gives up, `RetryPolicy` waits, and the stream is opened
again after its last row. The retries of `datasets` in between are off, since they wait without a message.

Transient errors: a lost or refused connection, no answer in time, and the statuses of `TRANSIENT`. A damaged file may
have been cut in transit, and is read again a few times. All other errors (404, 401, 403) are permanent.
"""

import functools
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from jaxllm.errors import UserError, one_line

MAX_SECONDS = 900.0
"""Seconds without a row after which a run ends: rate limits are counted over five minutes, and an outage of a quarter
of an hour needs a person. The run can then be resumed from its last checkpoint."""

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the stream is opened again; twice as long each time."""

DAMAGED_TRIES = 3
"""How often a file is read that cannot be decoded."""

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses of a server that is busy or under repair."""

_CLIENT, _READER, _PARQUET = (
    "huggingface_hub.utils._http",
    "datasets.utils.file_utils",
    "datasets.packaged_modules.parquet.parquet",
)


class RetryPolicy:
    """Retries of one stream, which reports every row and every error."""

    def __init__(self, what: str):
        self._what = what
        self.succeeded()

    def succeeded(self) -> None:
        self._since: float | None = None  # time of the first error in a row
        self._tries = 0

    def wait(self, error: Exception) -> None:
        """Wait before the stream is opened again.

        Raises:
            UserError: the error is permanent, or has lasted too long.
        """
        now = time.monotonic()
        self._since = self._since or now
        self._tries += 1
        cause, where = transient_cause(error), _shard(error)
        if cause is None or (cause == DAMAGED and self._tries >= DAMAGED_TRIES):
            raise UserError(
                f"data: {self._what}{where} cannot be read ({_innermost(error)}): check that it is still on the Hub "
                "and that you may read it; started again, the run resumes from its last checkpoint"
            ) from None
        if now - self._since > MAX_SECONDS:
            raise UserError(
                f"data: {self._what}{where} has not come for {now - self._since:.0f} s ({cause}): check the network; "
                "started again, the run resumes from its last checkpoint"
            ) from None
        seconds = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (self._tries - 1))
        _say(cause, f"the stream is opened again in {seconds:.0f} s")
        time.sleep(seconds)


DAMAGED = "a damaged file"


def transient_cause(error: BaseException) -> str | None:
    """The cause of a transient error; None if the error is permanent."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    http_error = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")  # httpx or its successor
    chain = list(_chain(error))
    for one in chain:
        if isinstance(one, OfflineModeIsEnabled):
            return None
        if isinstance(one, HfHubHTTPError):
            status = getattr(one.response, "status_code", None)
            return f"HTTP {status}" if status in TRANSIENT else None
        if isinstance(one, http_error):
            return "no answer in time" if "Timeout" in type(one).__name__ else "connection lost"
    for one in chain:
        if isinstance(one, TimeoutError | ConnectionError):
            return "connection lost"
        if type(one) is OSError or type(one).__module__.startswith("pyarrow"):
            return DAMAGED
    return None


@functools.cache
def report_client_retries() -> None:
    """Print a line for every request that the client repeats, and limit the time of each request.

    Messages of the client and the readers themselves are not shown.
    """
    logger = logging.getLogger(_CLIENT)
    logger.addHandler(_Repeats())
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    for name in (_READER, _PARQUET):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import get_session

    plain = get_session()
    hooks = [*plain.event_hooks["request"], _bound_wait]
    set_client_factory(lambda: type(plain)(event_hooks={"request": hooks}, follow_redirects=True, timeout=None))


def _bound_wait(request: Any) -> None:
    """Give requests about a repository, which have no time limit, that of downloads."""
    from huggingface_hub import constants

    limits = request.extensions["timeout"]
    request.extensions["timeout"] = {
        name: constants.HF_HUB_DOWNLOAD_TIMEOUT if seconds is None else seconds for name, seconds in limits.items()
    }


asked_again: Counter[str] = Counter()
"""Requests repeated in this process, by cause."""


class _Repeats(logging.Handler):
    """The client logs two lines for each repeated request: the first has the cause, the second the wait."""

    def __init__(self):
        super().__init__()
        self._cause = ""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if " thrown while requesting " in text:
            cause = text.partition(" thrown while requesting ")[0]
            if cause.startswith("HTTP Error "):
                self._cause = f"HTTP {cause.removeprefix('HTTP Error ')}"
            else:
                self._cause = "no answer in time" if "timed out" in cause else f"connection lost: {cause[1:-1]}"
        elif wait := re.search(r"(\d+)(?:\.\d+)?s\b", text):
            _say(self._cause, f"asked again in {wait[1]} s")


def _say(cause: str, what: str) -> None:
    """Print one line above the progress bar, from the thread that waits."""
    asked_again[cause.partition(":")[0]] += 1
    causes = ", ".join(f"{name} ({count})" for name, count in asked_again.items())
    tqdm.write(f"The Hub: {cause}; {what}. So far the Hub was asked again {asked_again.total()} times: {causes}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _innermost(error: BaseException) -> str:
    *_, last = _chain(error)
    return one_line(last)


def _shard(error: BaseException) -> str:
    """The file that an error is about, if the Hub named it."""
    for one in _chain(error):
        url = str(getattr(getattr(one, "response", None), "url", ""))
        if "/resolve/" in url:
            return f", file {url.partition('/resolve/')[2].partition('/')[2].partition('?')[0]},"
    return ""
