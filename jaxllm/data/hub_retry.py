"""Requests to the Hub: whether it answers, which errors are transient, and how long to wait before the next try.

There are two loops. The Hub's client repeats a request up to five times in about half a minute, or when the server's
Retry-After says; its own messages report this. When it gives up, `RetryPolicy` waits, and the stream is opened again
after its last row. The retries of `datasets` in between are off, since they wait without a message.
"""

import functools
import logging
import time
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
"""How often a file is read that cannot be decoded: it may have been cut in transit."""

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses of a server that is busy or under repair."""

DAMAGED = "a damaged file"


class RetryPolicy:
    """Retries of one stream, which reports every row and every error."""

    def __init__(self, what: str):
        self._what = what
        self.succeeded()

    def succeeded(self) -> None:
        self._since: float | None = None  # time of the first error in a row
        self._tries = 0

    def wait(self, error: Exception) -> None:
        """Wait before the stream is opened again. A permanent or lasting error becomes a UserError."""
        now = time.monotonic()
        self._since = self._since or now
        self._tries += 1
        cause, where = transient_cause(error), _shard(error)
        if cause is None or (cause == DAMAGED and self._tries >= DAMAGED_TRIES):
            *_, innermost = _chain(error)
            raise UserError(
                f"data: {self._what}{where} cannot be read ({one_line(innermost)}): check that it is still on the Hub "
                "and that you may read it; started again, the run resumes from its last checkpoint"
            ) from None
        if now - self._since > MAX_SECONDS:
            raise UserError(
                f"data: {self._what}{where} has not come for {now - self._since:.0f} s ({cause}): check the network; "
                "started again, the run resumes from its last checkpoint"
            ) from None
        seconds = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (self._tries - 1))
        tqdm.write(f"The Hub: {cause}; the stream is opened again in {seconds:.0f} s (retry {self._tries})")
        time.sleep(seconds)


def transient_cause(error: BaseException) -> str | None:
    """The cause of a transient error; None if the error is permanent, as 404, 401 and 403 are."""
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
            return one_line(one)
    for one in chain:
        if isinstance(one, TimeoutError | ConnectionError):
            return one_line(one)
        if type(one) is OSError or type(one).__module__.startswith("pyarrow"):
            return DAMAGED
    return None


class _AboveProgressBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"The Hub's client: {record.getMessage()}")


@functools.cache
def configure_clients() -> None:
    """Print the messages of the Hub's client; turn off the retries of `datasets` and its messages on errors."""
    import datasets
    from huggingface_hub import logging as hub_logging

    client = hub_logging.get_logger("huggingface_hub")
    client.handlers, client.propagate = [_AboveProgressBar()], False
    datasets.logging.set_verbosity(logging.CRITICAL)  # pyright: ignore[reportAttributeAccessIssue]
    config: Any = datasets.config  # pyright: ignore[reportAttributeAccessIssue]
    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 1
    for name in ("READ", "READ_SERVER_UNAVAILABLE", "READ_RATE_LIMIT", "OPEN"):
        setattr(config, f"STREAMING_{name}_RETRY_INTERVAL", 0)


def hub_reachable() -> bool:
    """Whether the Hub answers at all.

    Checked once before its clients are used: without a network they retry for half a minute per file.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    bound_requests()
    try:
        get_session().head(constants.ENDPOINT)
    except Exception:  # the HTTP library's own kinds, or the client's where HF_HUB_OFFLINE is set
        return False
    return True


def bound_requests() -> None:
    """Give requests about a repository, which have no time limit, that of downloads (HF_HUB_DOWNLOAD_TIMEOUT).

    Call it before each series of requests: after a failed connection the client makes a new session.
    """
    from huggingface_hub import get_session

    session = get_session()
    hooks = session.event_hooks
    if _bound not in hooks["request"]:
        session.event_hooks = hooks | {"request": [*hooks["request"], _bound]}


def _bound(request: Any) -> None:
    from huggingface_hub import constants

    limits = request.extensions["timeout"]
    request.extensions["timeout"] = {
        name: constants.HF_HUB_DOWNLOAD_TIMEOUT if seconds is None else seconds for name, seconds in limits.items()
    }


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _shard(error: BaseException) -> str:
    """The file that an error is about, if the Hub named it."""
    for one in _chain(error):
        url = str(getattr(getattr(one, "response", None), "url", ""))
        if "/resolve/" in url:
            return f", file {url.partition('/resolve/')[2].partition('/')[2].partition('?')[0]},"
    return ""
