"""Memory limit shared by the threads of `predict`."""

from __future__ import annotations

import threading

from cclip_deploy.common.limits import MOST_PICTURE_BYTES


class Room:
    """A counter of bytes that threads reserve before they allocate and release afterwards.

    A reservation larger than the limit waits until nothing else is reserved.
    """

    def __init__(self, most_bytes: int = MOST_PICTURE_BYTES) -> None:
        self.most_bytes = most_bytes
        self._taken = 0
        self._open = True
        self._changed = threading.Condition()

    def take(self, count: int) -> None:
        """Reserve `count` bytes; wait until they are available or `close` is called."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open or not self._taken or self._taken + count <= self.most_bytes)
            self._taken += count

    def give(self, count: int) -> None:
        """Release `count` bytes."""
        with self._changed:
            self._taken -= count
            self._changed.notify_all()

    def close(self) -> None:
        """Stop waiting in all threads."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
