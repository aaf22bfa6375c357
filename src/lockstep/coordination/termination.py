"""A rank's last words before SIGTERM ends it; processes forked from the rank do not speak for it."""

import contextlib
import functools
import os
import signal
import threading
import time
import weakref

from lockstep.coordination.peers import Peers

# How long the main thread may take to run a signal's handler: it may be waiting inside torch.
_HANDLER_S = 1.0

_peers_of_this_process: "weakref.WeakSet[Peers]" = weakref.WeakSet()
_lock = threading.Lock()
_installed = False


def speak_before_termination(peers: Peers) -> None:
    """Let SIGTERM end this process only after last words; an existing handler stays."""
    global _installed
    _peers_of_this_process.add(peers)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    signal.signal(signal.SIGTERM, _on_sigterm)
    if not _installed:
        _installed = True
        # The child begins with SIGTERM blocked: until it has forgotten, it would speak in the parent's name.
        os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_forget)
    _watch_signals()


def _on_sigterm(*_: object) -> None:
    _say()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def _say() -> None:
    for peers in list(_peers_of_this_process) if _lock.acquire(blocking=False) else ():
        with contextlib.suppress(Exception):  # whatever fails here, the process ends
            text = peers.terminate()
            if text:
                os.write(2, f"{text}\n".encode(errors="replace"))


def _watch_signals() -> None:
    """Speak from another thread if the main thread does not get to run the handler."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    if before != -1:  # set by other software, such as asyncio
        signal.set_wakeup_fd(before)
        os.close(reading)
        os.close(writing)
        return

    def watch() -> None:
        while signal.SIGTERM not in os.read(reading, 1):
            pass
        time.sleep(_HANDLER_S)
        _say()
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="lockstep-sigterm", daemon=True).start()


_hold = functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGTERM})
_let_go = functools.partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, {signal.SIGTERM})


def _forget() -> None:
    """In a forked child: it is not a rank, whatever it inherits."""
    signal.set_wakeup_fd(-1)
    if signal.getsignal(signal.SIGTERM) is _on_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for peers in list(_peers_of_this_process):
        peers.mute()
    _peers_of_this_process.clear()
    _let_go()
