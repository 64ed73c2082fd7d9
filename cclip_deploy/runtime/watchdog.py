"""Stop runs of a graph that take too long, for services that run untrusted bundles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Timer

from cclip_deploy.errors import EnvironmentIssue, UsageError


def check_seconds_limit(seconds: float | None) -> None:
    """Raise UsageError if a limit is not positive; None means no limit."""
    if seconds is not None and not 0 < seconds < float("inf"):
        raise UsageError(f"seconds_limit is {seconds}; it must be a positive number of seconds, or None for no limit.")


@contextmanager
def time_limit(seconds: float | None, stop: Callable[[], object], what: str) -> Iterator[None]:
    """Call `stop` from another thread if the block runs longer than `seconds`.

    `stop` has to make the block raise. Runtimes stop between two operators, so a single operator is not interrupted.

    Raises:
        EnvironmentIssue: the block raised after `stop` was called; the message names `what`.
    """
    if seconds is None:
        yield
        return
    was_stopped = Event()

    def end() -> None:
        was_stopped.set()
        stop()

    timer = Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        if not was_stopped.is_set():
            raise
        raise EnvironmentIssue(
            f"{what} ran longer than {seconds} s and was stopped. Set a higher seconds_limit, or use a smaller image "
            "or fewer prompts."
        ) from error
    finally:
        timer.cancel()
