"""Check numbers of threads, and set PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cclip_deploy.common.limits import MAX_THREADS
from cclip_deploy.errors import UsageError


def check_threads(threads: int | None) -> None:
    """Raise UsageError unless `threads` is None or between 1 and MAX_THREADS."""
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"{threads} threads are out of range. Use 1 to {MAX_THREADS}.")


def set_torch_threads(threads: int | None) -> None:
    """Set the number of threads that PyTorch uses for one operator; None leaves it unchanged."""
    check_threads(threads)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Run a block with this many PyTorch threads, and restore the previous number afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
