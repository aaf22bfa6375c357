"""The ranks of an engine as processes of this host: started, listened to, watched, and ended with this one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from lockstep.coordination.processes import ProcessIdentity, ProcessState, pid_namespace
from lockstep.errors import RankAbsentError
from lockstep.runner.ranks import EngineOptions

OnMessage = Callable[[int, dict[str, Any]], None]

_STOP_S = 10.0
_MARGIN_S = 2.0  # what the ranks themselves find out comes first: it says more
ECHOES_S = 3.0
"""How long a failure that may be another rank's doing waits for that one's own words."""


class Ranks(Protocol):
    """What an engine's front needs of the ranks behind it.

    Attributes:
        num_processes: that send `ready` once each.
    """

    num_processes: int

    def start(self, on_message: OnMessage) -> None:
        """Start them. From then on `on_message(rank, message)` is called for each message, from any thread.

        A rank that has failed sends `{"failed": type, "why": text}` and nothing after that.
        """

    def send(self, data_rank: int, message: dict[str, Any]) -> None:
        """Send a message to all processes of a data-parallel rank."""

    def check(self) -> None:
        """Raise `RankAbsentError` for ranks that do not run, though nobody else would say so."""

    def states(self) -> list[ProcessState]:
        """Return what the operating system says of each process."""

    def stop(self) -> None:
        """Let all ranks end, and wait for it."""

    def kill(self, error: BaseException | None = None) -> None:
        """End all ranks now, because of an error if there is one; from any thread, and as often as one likes."""


class RankProcesses:
    """Processes of this host, a socket pair to each, and a thread that listens to each."""

    def __init__(self, options: EngineOptions) -> None:
        self.num_processes = options.world_size
        self._options = options
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[socket.socket] = []
        self._stopped_since: dict[int, float] = {}
        self._lock = threading.Lock()  # between `start` and `kill`
        self._ending = False
        self._store: Any = None

    def start(self, on_message: OnMessage) -> None:
        """See `Ranks`. The kernel ends the ranks with the calling thread: call it from one that lives as long."""
        self._store = _open_store() if self.num_processes > 1 else None
        port = self._store.port if self._store is not None else 0
        for rank in range(self.num_processes):
            with self._lock:
                if self._ending:
                    return
                self._start_one(rank, on_message)
            self._send_one(rank, {"options": dataclasses.asdict(self._options), "store_port": port})

    def send(self, data_rank: int, message: dict[str, Any]) -> None:
        """See `Ranks`."""
        size = self._options.tensor_parallel_size
        for rank in range(data_rank * size, (data_rank + 1) * size):
            self._send_one(rank, message)

    def check(self) -> None:
        """See `Ranks`: a process that was stopped, and goes on neither by itself nor within the deadline."""
        now = time.monotonic()
        for rank, (process, state) in enumerate(zip(self._processes, self.states(), strict=True)):
            if state == "stopped":
                since = self._stopped_since.setdefault(rank, now)
                if now - since > self._options.deadline_s + _MARGIN_S:
                    stopped = f"rank {rank} was stopped (process {process.pid})"
                    text = f"{stopped} and did not go on within {self._options.deadline_s:g} s"
                    raise RankAbsentError(text, (rank,))
            else:
                self._stopped_since.pop(rank, None)

    def states(self) -> list[ProcessState]:
        """See `Ranks`."""
        return [
            "gone" if process.poll() is not None else ProcessIdentity(process.pid, 0, pid_namespace()).state()
            for process in self._processes
        ]

    def stop(self) -> None:
        """See `Ranks`."""
        self._ending = True
        for rank in range(len(self._sockets)):
            self._send_one(rank, {"stop": True})
        until = time.monotonic() + _STOP_S
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        self.kill()

    def kill(self, error: BaseException | None = None) -> None:
        """See `Ranks`."""
        with self._lock:
            self._ending = True
            for process in self._processes:
                if process.poll() is None:
                    process.kill()
            for process in self._processes:
                process.wait()
            for connection in self._sockets:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)  # which wakes the thread that reads; closing would not
                connection.close()
            self._store = None

    def _start_one(self, rank: int, on_message: OnMessage) -> None:
        mine, theirs = socket.socketpair()
        # A rank that was stopped reads nothing: whoever sends to it must not wait for ever.
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(self._options.deadline_s) + 1, 0))
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "lockstep.runner.worker", str(theirs.fileno()), str(os.getpid())],
                env=os.environ | self._environment(rank),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,  # a terminal's Ctrl-C is for this process alone
            )
        self._processes.append(process)
        self._sockets.append(mine)
        listened = (rank, mine, process, on_message)
        threading.Thread(target=self._listen, args=listened, name=f"lockstep-rank-{rank}", daemon=True).start()

    def _environment(self, rank: int) -> dict[str, str]:
        loopback = {name: os.environ.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
        return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.num_processes), **loopback}

    def _send_one(self, rank: int, message: dict[str, Any]) -> None:
        try:
            self._sockets[rank].sendall(json.dumps(message).encode() + b"\n")
        except BlockingIOError:
            raise RankAbsentError(f"rank {rank} read nothing within {self._options.deadline_s:g} s", (rank,)) from None
        except OSError:
            pass  # a rank that is gone is reported by the thread that listens to it

    def _listen(
        self, rank: int, connection: socket.socket, process: subprocess.Popen[bytes], on_message: OnMessage
    ) -> None:
        failed = False
        with contextlib.suppress(OSError, ValueError), connection.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                failed = failed or "failed" in message
                on_message(rank, message)
        if not self._ending and not failed:
            on_message(rank, {"failed": "died", "why": _how_it_ended(process.wait())})


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    names = {number.value: f" ({number.name})" for number in signal.Signals}
    return f"its process was ended by signal {-code}{names.get(-code, '')}"


def _open_store() -> Any:
    import torch.distributed as dist

    # Of its own accord the store would listen on every interface.
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
