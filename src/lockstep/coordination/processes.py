"""Another process's state according to the operating system: alive, stopped, gone or unknown."""

import os
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple
from zlib import crc32

ProcessState = Literal["alive", "stopped", "gone", "unknown"]

_PROC = Path("/proc")


class ProcessIdentity(NamedTuple):
    """A process, unique even if its number is reused; `started` in ticks since boot, PID `namespace`; 0 is unknown."""

    pid: int
    started: int
    namespace: int

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity":
        """Return the identity of a process visible to this one."""
        found = _stat(pid, _PROC)
        return cls(pid, found[1] if found else 0, pid_namespace())

    @classmethod
    def own(cls) -> "ProcessIdentity":
        """Return the identity of this process."""
        return cls.of(os.getpid())

    def describe(self) -> str:
        """Return what is known of it as the end of a message, or an empty string."""
        state = self.state()
        if state == "gone":
            return f"; its process {self.pid} is gone"
        return f"; its process is {state}" if state != "unknown" else ""

    def state(self, proc: Path = _PROC) -> ProcessState:
        """Return its state; `gone` means certainly no longer there, `unknown` that it cannot be read."""
        if self.pid <= 0 or not self.namespace or self.namespace != pid_namespace():
            return "unknown"
        try:
            os.kill(self.pid, 0)  # the kernel itself, which needs neither `/proc` nor a file descriptor
        except ProcessLookupError:
            return "gone"
        except (PermissionError, OverflowError):
            pass
        found = _stat(self.pid, proc)
        if found is None:
            return "unknown"
        letter, started = found
        if letter in "ZX" or (self.started and started != self.started):
            return "gone"
        return "stopped" if letter in "Tt" else "alive"


def pid_namespace() -> int:
    """Return a number of this host's boot and this process's PID namespace, 0 if it cannot be read."""
    try:
        return _boot() << 32 | os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


@cache
def _boot() -> int:
    """Return a number of this host's boot: all hosts give their first PID namespace the same number."""
    return crc32((_PROC / "sys/kernel/random/boot_id").read_bytes())


def _stat(pid: int, proc: Path) -> tuple[str, int] | None:
    """Return a process's state letter and start time, or None where they cannot be read."""
    try:
        text = (proc / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    # The second entry is the program's name in brackets, which may contain anything.
    entries = text[text.rindex(b")") + 2 :].split()
    return entries[0].decode(), int(entries[19])
