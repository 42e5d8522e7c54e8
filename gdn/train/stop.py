"""Stopping on request: the first SIGINT or SIGTERM asks the loop to stop after its step, a second one stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Listens for signals inside a `with` block. Only the main thread can; elsewhere nothing is changed."""

    def __init__(self) -> None:
        self.received: int = 0
        """The number of the signal that came, 0 without one."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def exit_code(received: int) -> int:
    """The status a shell expects from a process that a signal ended: 130 after Ctrl-C, 143 after SIGTERM, 0 without a signal."""
    return 128 + received if received else 0
