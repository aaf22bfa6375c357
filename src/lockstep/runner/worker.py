"""A rank of `lockstep.Engine`, as a process of its own: `python -m lockstep.runner.worker FD PARENT`.

FD is one end of a socket pair; messages are lines of JSON. The first says what to run. PARENT is the process that
started this one, which ends with it, whatever it does at the time.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
from typing import Any

from lockstep.runner.failures import failure_of
from lockstep.runner.leftovers import kill_with_parent

_START_S = 60.0
_LAST_WORDS_S = 5.0


def take_all(received: queue.SimpleQueue[dict[str, Any]], timeout_s: float) -> list[dict[str, Any]]:
    """Return what is in a queue; if nothing is, wait at most this long for something."""
    messages = []
    with contextlib.suppress(queue.Empty):
        messages.append(received.get(timeout=timeout_s) if timeout_s else received.get_nowait())
        while True:
            messages.append(received.get_nowait())
    return messages


class SocketMailbox:
    """Lines of JSON over a socket. One thread reads and one writes: neither side waits for the other's work."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._unsent: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="lockstep-mailbox-in", daemon=True).start()
        self._writer = threading.Thread(target=self._write, name="lockstep-mailbox-out", daemon=True)
        self._writer.start()

    def receive(self, timeout_s: float) -> list[dict[str, Any]]:
        """Return what has come; if nothing has, wait at most this long for something."""
        return take_all(self._received, timeout_s)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; returns at once."""
        self._unsent.put(message)

    def flush(self, timeout_s: float) -> None:
        """Wait until all is sent, at most this long; nothing can be sent afterwards."""
        self._unsent.put(None)
        self._writer.join(timeout_s)

    def _read(self) -> None:
        with contextlib.suppress(OSError), self._connection.makefile("rb") as lines:
            for line in lines:
                self._received.put(json.loads(line))
        os._exit(1)  # nobody is left to work for

    def _write(self) -> None:
        while (message := self._unsent.get()) is not None:
            try:
                self._connection.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                os._exit(1)


def main() -> None:
    """Run one rank until it is told to stop."""
    _end_with(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started the ranks
    mailbox = SocketMailbox(socket.socket(fileno=int(sys.argv[1])))
    rank = int(os.environ["RANK"])
    logging.basicConfig(level=logging.WARNING, format=f"rank {rank}: %(levelname)s %(name)s: %(message)s")
    code = 0
    try:
        (start,) = mailbox.receive(_START_S)[:1]
        _serve(rank, start, mailbox)
        mailbox.send({"ended": True})
    except BaseException as error:
        mailbox.send(failure_of(rank, error))
        code = 1
    mailbox.flush(_LAST_WORDS_S)
    os._exit(code)  # groups may be in any state; an orderly end of them could take their whole time-out


def _end_with(parent: int) -> None:
    """Let this process end with its parent."""
    kill_with_parent()
    if os.getppid() != parent:  # it had ended before that took effect
        os._exit(1)


def _serve(rank: int, start: dict[str, Any], mailbox: SocketMailbox) -> None:
    import torch.distributed as dist
    from transformers.utils import logging as transformers_logging

    from lockstep.runner.rank_loop import run_rank
    from lockstep.runner.ranks import EngineOptions, detokenizer_of, find_tokenizer, join_group, make_engine

    transformers_logging.disable_progress_bar()  # those of several ranks would overwrite each other
    options = EngineOptions(**start["options"])
    limit_s, port = options.start_timeout_s, start["store_port"]

    def open_store() -> Any:
        return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=datetime.timedelta(seconds=limit_s))

    join_group(rank, options.world_size, open_store, limit_s)
    engine = make_engine(options)
    detokenizer = detokenizer_of(find_tokenizer(options.model))
    mailbox.send({"ready": engine.about()})
    run_rank(engine, mailbox, detokenizer=detokenizer)


if __name__ == "__main__":
    main()
