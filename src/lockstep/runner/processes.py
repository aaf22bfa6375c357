"""The ranks of one host as processes: forked from a server that has everything imported, ended with this process.

A process that starts ranks starts the server once, and asks it for a process per rank. The kernel ends the server with
this process, and the ranks with the server, also those that are stopped. Nothing is left in the file system.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing import current_process, spawn
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, Self

from lockstep.coordination.processes import ProcessIdentity, ProcessState, pid_namespace
from lockstep.errors import LockstepError, RankAbsentError

OnMessage = Callable[[int, dict[str, Any]], None]

LOOK_S = 0.25
"""How often a wait for ranks checks for stopped ones."""
MARGIN_S = 1.5
"""Extra patience of the launcher beyond the ranks' deadline: the ranks' own errors say more."""
_PR_SET_PDEATHSIG = 1
_AFTER_KILL_S = 5.0
_FORK_S = 300.0  # for the first rank of a process everything is imported, perhaps from a slow disk
_REQUEST_BYTES = 4096


class Ranks:
    """Processes that were started together; leaving the `with` block ends them.

    Each runs `main(connection, rank, *args)`, with the variables of `environment(rank)` besides those of this process.
    What it sends comes to `on_message(rank, message)`, from a thread per rank; the last message is
    `{"failed": "died", "why": how its process ended, "exit_code": code}`. The server imports `preload` before it forks.
    A message may wait `patience_s` for a rank to read it.
    """

    def __init__(
        self, num_ranks: int, main: Callable[..., None], args: Sequence[Any], on_message: OnMessage, *,
        preload: Sequence[str] = (), environment: Callable[[int], dict[str, str]] = lambda rank: {},
        patience_s: float = 30.0,
    ) -> None:  # fmt: skip
        self.processes: list[RankProcess] = []
        self._num_ranks = num_ranks
        self._start: Callable[..., RankProcess] = lambda rank, *more: RankProcess(
            rank, main, (*args, *more), on_message, preload, environment, patience_s
        )
        self._lock = threading.Lock()  # between `start` and `kill`
        self._ended = False
        self._looked = time.monotonic()

    def __enter__(self) -> Self:
        try:
            for rank in range(self._num_ranks):
                with self._lock:
                    if not self._ended:
                        self.processes.append(self._start(rank))
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill_one(self, rank: int) -> None:
        """Kill a rank that is given up."""
        self.processes[rank].kill()

    def kill(self, _error: BaseException | None = None) -> None:
        """End all ranks now. From any thread; idempotent."""
        with self._lock:
            self._ended = True
            for process in self.processes:
                process.kill()
            for process in self.processes:
                process.exit_code(_AFTER_KILL_S)

    def start_again(self, rank: int, *more_args: Any) -> None:
        """Start the process of a rank again, with more arguments, once the last one has ended."""
        with self._lock:
            if not self._ended:
                self.processes[rank] = self._start(rank, *more_args)

    def check_stopped(self, deadline_s: float, is_ending: bool, can_survive: bool) -> None:
        """Kill ranks that stay stopped if the others `can_survive` that; otherwise raise `RankAbsentError`.

        They have until the deadline; half of it where the others have stopped working, and wait (`is_ending`).
        """
        now, limit_s = time.monotonic(), deadline_s / 2 if is_ending else deadline_s + MARGIN_S
        # Time in which this process was stopped too does not count.
        passed, self._looked = min(now - self._looked, 2 * LOOK_S), now
        for process in self.processes:
            if process.state() != "stopped":
                process.stopped_s = -1.0
            else:
                process.stopped_s = process.stopped_s + passed if process.stopped_s >= 0 else 0.0
        stopped = [process.rank for process in self.processes if process.stopped_s > limit_s]
        if stopped and not can_survive:
            raise self.absent(stopped, f"stood still for more than {deadline_s:g} s")
        for rank in stopped:
            self.kill_one(rank)

    def absent(self, ranks: Sequence[int], why: str) -> RankAbsentError:
        """Return the error for ranks that are not there, with what the operating system says of them."""
        states = "; ".join(f"the process of rank {rank} is {self.processes[rank].state()}" for rank in ranks)
        return RankAbsentError(f"{rank_names(ranks)} {why}; {states}", tuple(ranks))


class RankProcess:
    """One rank's process, and the connection to it."""

    def __init__(
        self, rank: int, main: Callable[..., None], args: Sequence[Any], on_message: OnMessage, preload: Sequence[str],
        environment: Callable[[int], dict[str, str]], patience_s: float,
    ) -> None:  # fmt: skip
        self.rank, self.stopped_s = rank, -1.0
        self._patience_s = patience_s
        mine, theirs = socket.socketpair()
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(patience_s) + 1, 0))
        with theirs:
            # If Ctrl-C hides a rank's process id from this process, the rank ends with its connection.
            self.pid, self._exit_code = _server().fork(preload, [theirs.fileno(), 1, 2])
        self._connection = Connection(os.dup(mine.fileno()))
        # Otherwise a process that the rank has forked, and that lives on, would keep the connection open.
        self._exit_code.add_done_callback(lambda _: _end_reading(mine))
        work = ForkingPickler.dumps((main, (rank, *args)))
        self.send({"environment": {**os.environ, **environment(rank)}, **_about_this_process(bytes(work))})
        with contextlib.suppress(OSError):
            self._connection.send_bytes(work)
        threading.Thread(target=self._listen, args=(on_message,), name=f"lockstep-rank-{rank}", daemon=True).start()

    def send(self, message: Any) -> None:
        """Send a message; nothing happens where the rank is gone, which its listener says.

        Raises:
            RankAbsentError: the rank does not read, as one that is stopped.
        """
        try:
            self._connection.send(message)
        except BlockingIOError:
            raise RankAbsentError(f"rank {self.rank} read nothing in {self._patience_s:g} s", (self.rank,)) from None
        except OSError:
            pass

    def kill(self) -> None:
        """End it now."""
        if not self._exit_code.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def exit_code(self, timeout_s: float | None = None) -> int | None:
        """Wait for its end and return how it ended, negative for a signal; None if it goes on."""
        with contextlib.suppress(TimeoutError):
            return self._exit_code.result(timeout_s)
        return None

    def state(self) -> ProcessState:
        """Return what the operating system says of it."""
        return "gone" if self._exit_code.done() else ProcessIdentity(self.pid, 0, pid_namespace()).state()

    def _listen(self, on_message: OnMessage) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                on_message(self.rank, self._connection.recv())
        code = self.exit_code()
        self._connection.close()
        on_message(self.rank, {"failed": "died", "why": how_it_ended(code), "exit_code": code})


def _end_reading(connection: socket.socket) -> None:
    """Let reads end with what has come so far."""
    with connection, contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RD)


def rank_names(ranks: Iterable[int]) -> str:
    """Return `rank 3`, or `ranks 0, 3`."""
    numbers = ", ".join(map(str, sorted(ranks)))
    return f"rank{'s' * (',' in numbers)} {numbers}"


def how_it_ended(code: int | None) -> str:
    """Return in words how a process ended."""
    if code is None or code >= 0:
        return f"its process ended with exit code {code}"
    names = {number.value: f" ({number.name})" for number in signal.Signals}
    return f"its process was ended by signal {-code}{names.get(-code, '')}"


def _about_this_process(work: bytes) -> dict[str, Any]:
    """What a rank takes over, as `multiprocessing.spawn.prepare` does it; the script only if its names are needed."""
    about: dict[str, Any] = {"sys_path": list(sys.path), "sys_argv": list(sys.argv), "dir": os.getcwd()}
    about["authkey"] = bytes(current_process().authkey)  # with which a rank asks for tensors among its arguments
    script = sys.modules["__main__"]
    if b"__main__" not in work:
        return about
    if script.__spec__ is not None:
        return {**about, "init_main_from_name": script.__spec__.name}
    return {**about, "init_main_from_path": os.path.abspath(str(script.__file__))}


@dataclass
class _Requested:
    pid: Future[int] = field(default_factory=Future)
    exit_code: Future[int] = field(default_factory=Future)


class _Server:
    """This process's side of the server that forks ranks."""

    def __init__(self) -> None:
        self.owner, self.ended = os.getpid(), False
        self._control, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._numbers, self._requested = itertools.count(), dict[int, _Requested]()
        # The kernel ends the server with the thread that has started it: this one lives as long as the process.
        threading.Thread(target=self._run, name="lockstep-ranks", daemon=True).start()

    def fork(self, preload: Sequence[str], descriptors: Sequence[int]) -> tuple[int, Future[int]]:
        """Start a rank that gets these descriptors; return its process and, when it has ended, its exit code."""
        number, requested = next(self._numbers), _Requested()
        self._requested[number] = requested
        with contextlib.suppress(BrokenPipeError):
            socket.send_fds(self._control, [" ".join([str(number), *preload]).encode()], descriptors)
        if self.ended:
            self._give_up()
        try:
            return requested.pid.result(_FORK_S), requested.exit_code
        except TimeoutError:
            raise LockstepError(f"the process from which ranks are forked started none in {_FORK_S:g} s") from None

    def _run(self) -> None:
        with self._theirs as theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno()), str(os.getpid())]
            # A terminal's Ctrl-C is for this process alone.
            server = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, process_group=0)
        with contextlib.suppress(OSError):
            while message := self._control.recv(_REQUEST_BYTES):
                number, pid, *code = map(int, message.split())
                if code:
                    self._requested.pop(number).exit_code.set_result(code[0])
                else:
                    self._requested[number].pid.set_result(pid)
        server.wait()
        self.ended = True
        self._give_up()

    def _give_up(self) -> None:
        """The server has ended, and all ranks with it."""
        while self._requested:
            with contextlib.suppress(KeyError):
                _, requested = self._requested.popitem()
                requested.exit_code.set_result(-signal.SIGKILL)
                if not requested.pid.done():
                    requested.pid.set_exception(LockstepError("the process from which ranks are forked has ended"))


_the_server: list[_Server] = []
_server_lock = threading.Lock()


def _server() -> _Server:
    with _server_lock:
        if not _the_server or _the_server[0].ended or _the_server[0].owner != os.getpid():
            _the_server[:] = [_Server()]
        return _the_server[0]


def _serve(control: socket.socket, parent: int) -> None:
    """Fork a rank for each request, and report when and how it ended."""
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    numbers: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([control.fileno(), reading], [], [])
        if reading in ready:
            os.read(reading, _REQUEST_BYTES)
            for pid in list(numbers):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    control.send(f"{numbers.pop(pid)} {pid} {os.waitstatus_to_exitcode(status)}".encode())
        if control.fileno() in ready:
            request, descriptors, _, _ = socket.recv_fds(control, _REQUEST_BYTES, 3)
            if not request:
                return
            number, *preload = request.decode().split()
            for name in preload:
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
            server = os.getpid()
            pid = os.fork()
            if pid == 0:
                control.close()
                os.close(reading)
                os.close(writing)
                _become_rank(descriptors, server)
            numbers[pid] = int(number)
            control.send(f"{number} {pid}".encode())
            for descriptor in descriptors:
                os.close(descriptor)


def _become_rank(descriptors: Sequence[int], server: int) -> None:
    """Run a rank; however it ends, the process exits at once, since groups may be in any state."""
    exit_code = 1
    try:
        end_with(server)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setpgid(0, 0)
        connection, *streams = descriptors
        for number, stream in enumerate(streams, 1):
            os.dup2(stream, number)
            os.close(stream)
        os.set_inheritable(connection, False)
        to_parent = Connection(connection)
        try:
            about = to_parent.recv()
            os.environ.clear()
            os.environ.update(about.pop("environment"))
            spawn.prepare(about)
            main, args = to_parent.recv()
        except EOFError:  # its parent was interrupted
            os._exit(1)
        main(to_parent, *args)
        exit_code = 0
    except SystemExit as ended:  # of a process that the rank has forked
        exit_code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(exit_code)


def end_with(parent: int) -> None:
    """Let the kernel end this process by SIGKILL, which also ends what is stopped, when its parent ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it had ended before that took effect
        os._exit(1)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
