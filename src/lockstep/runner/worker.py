"""A rank of `lockstep.Engine`, as a process of its own: `python -m lockstep.runner.worker FD`.

FD is one end of a socket pair; messages are lines of JSON. The first says what to run. The process ends with the other
end of the socket, whatever it does at the time.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from typing import Any

from lockstep.errors import LockstepError


class SocketMailbox:
    """Lines of JSON over a socket; a thread reads, so that nobody who sends has to wait for a rank that steps.

    Args:
        connection: one end of a socket pair.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        threading.Thread(target=self._read, name="lockstep-mailbox", daemon=True).start()

    def receive(self, timeout_s: float) -> list[dict[str, Any]]:
        """Return what has come; if nothing has, wait at most this long for something."""
        messages = []
        try:
            messages.append(self._received.get(timeout=timeout_s) if timeout_s else self._received.get_nowait())
            while True:
                messages.append(self._received.get_nowait())
        except queue.Empty:
            return messages

    def send(self, message: dict[str, Any]) -> None:
        """Send a message."""
        with self._lock:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def _read(self) -> None:
        with self._connection.makefile("rb") as lines:
            for line in lines:
                self._received.put(json.loads(line))
        os._exit(1)  # nobody is left to work for


def main() -> None:
    """Run one rank until it is told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the process that started the ranks
    mailbox = SocketMailbox(socket.socket(fileno=int(sys.argv[1])))
    rank = int(os.environ["RANK"])
    logging.basicConfig(level=logging.WARNING, format=f"rank {rank}: %(levelname)s %(name)s: %(message)s")
    code = 0
    try:
        (start,) = mailbox.receive(60.0)[:1]
        _serve(start, mailbox)
        mailbox.send({"ended": True})
    except LockstepError as error:
        mailbox.send({"failed": type(error).__name__, "why": str(error)})
        code = 1
    except BaseException as error:
        logging.getLogger(__name__).error("rank %d failed:\n%s", rank, traceback.format_exc())
        mailbox.send({"failed": type(error).__name__, "why": f"{type(error).__name__}: {error}"})
        code = 1
    os._exit(code)  # groups may be in any state; an orderly end of them could take their whole time-out


def _serve(start: dict[str, Any], mailbox: SocketMailbox) -> None:
    from lockstep.runner.rank_loop import run_rank
    from lockstep.runner.ranks import EngineOptions, join_group, make_engine

    options = EngineOptions.from_json(start["options"])
    join_group(start["store_port"], options.start_timeout_s)
    engine = make_engine(options)
    mailbox.send({"ready": engine.about()})
    run_rank(engine, mailbox)


if __name__ == "__main__":
    main()
