"""Room in memory for pictures that are read ahead and masks that wait to be written."""

from __future__ import annotations

import threading

from cclip_deploy.common.limits import MOST_PICTURE_BYTES


class Room:
    """So many bytes, which threads take before they go on and give back when they are done.

    Something larger than the whole room gets in alone.
    """

    def __init__(self, most_bytes: int = MOST_PICTURE_BYTES) -> None:
        self.most_bytes = most_bytes
        self._taken = 0
        self._open = True
        self._changed = threading.Condition()

    def take(self, count: int) -> None:
        """Wait until there is room for `count` bytes, or until the room is closed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open or not self._taken or self._taken + count <= self.most_bytes)
            self._taken += count

    def give(self, count: int) -> None:
        """Give back what was taken."""
        with self._changed:
            self._taken -= count
            self._changed.notify_all()

    def close(self) -> None:
        """Let everybody in who waits: the work has ended."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
