"""Messages of an engine's rank: over a process's connection, or queues within one process."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Mailbox:
    """A rank's messages, plain dicts; `deliver` brings one in. Those of epochs before the present one are dropped."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self._received: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.deliver, self._send = self._received.put, send
        self.epoch = 0

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; returns at once."""
        self._send({"epoch": self.epoch} | message)

    def receive(self, timeout_s: float) -> list[dict[str, Any]]:
        """Return the messages received; if there are none, wait at most this long for one."""
        messages = []
        with contextlib.suppress(queue.Empty):
            messages.append(self._received.get(timeout=timeout_s) if timeout_s else self._received.get_nowait())
            while True:
                messages.append(self._received.get_nowait())
        return [message for message in messages if message.get("epoch", self.epoch) >= self.epoch]


class ConnectionMailbox(Mailbox):
    """Of a process. One thread reads and one writes: neither side waits for the other's work."""

    def __init__(self, connection: Connection) -> None:
        self._unsent: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        super().__init__(self._unsent.put)
        self._connection = connection
        threading.Thread(target=self._read, name="lockstep-mailbox-in", daemon=True).start()
        self._writer = threading.Thread(target=self._write, name="lockstep-mailbox-out", daemon=True)
        self._writer.start()

    def flush(self, timeout_s: float) -> None:
        """Wait until all is sent, at most this long; nothing can be sent afterwards."""
        self._unsent.put(None)
        self._writer.join(timeout_s)

    def _read(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                self.deliver(self._connection.recv())
        os._exit(1)  # nobody is left to work for

    def _write(self) -> None:
        while (message := self._unsent.get()) is not None:
            try:
                self._connection.send(message)
            except OSError:
                os._exit(1)
