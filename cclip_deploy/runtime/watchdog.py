"""End a run of a graph that takes too long, for services that run bundles of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Timer

from cclip_deploy.errors import EnvironmentIssue, UsageError


def check_seconds_limit(seconds: float | None) -> None:
    """UsageError for a limit that is not positive; None is no limit."""
    if seconds is not None and not 0 < seconds < float("inf"):
        raise UsageError(f"seconds_limit is {seconds}; give a positive number of seconds, or None for no limit.")


@contextmanager
def time_limit(seconds: float | None, stop: Callable[[], object], what: str) -> Iterator[None]:
    """Call `stop` in another thread where the block still runs after so many seconds.

    `stop` has to make the block raise. A runtime stops between two operators, so one operator alone is waited for.

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
