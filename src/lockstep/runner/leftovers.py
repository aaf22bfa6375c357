"""What would outlive a run that is killed: its ranks, and its folders in the temporary folder. Neither does."""

import contextlib
import ctypes
import multiprocessing
import os
import re
import secrets
import signal
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, util
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from lockstep.coordination.processes import ProcessIdentity

STORE = "store"
"""Name, in a run's folder, of the file through which its ranks meet."""

_PR_SET_PDEATHSIG = 1
# The name says whose folder it is, so that there is no moment in which that is not known.
_FOLDER = re.compile(r"lockstep-run-(\d+)-(\d+)-(\d+)-[0-9a-f]{8}")
_MARKER = "lockstep-run"
_MARKER_BYTES = 100
_SHORT_FOLDER, _MAX_SOCKET_PATH_BYTES = "/tmp", 107


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    """Make a run's folder in the temporary folder, for as long as the block; what dead runs have left there goes."""
    own, base = ProcessIdentity.own(), Path(tempfile.gettempdir())
    _remove_leftovers(base)
    _mark_folder_of_multiprocessing(own)
    folder = base / f"lockstep-run-{own.namespace}-{own.pid}-{own.started}-{secrets.token_hex(4)}"
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        _remove(folder)


def kill_with_parent() -> None:
    """Let the kernel end this process by SIGKILL, which also ends what is stopped, when its parent ends.

    Linux means the thread of the parent that started this process.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def end_with_parent() -> None:
    """Let this process, started by `multiprocessing`, end when the one that started it does; also if it is stopped."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    # The server that forked this process ends with the process that started it.
    kill_with_parent()
    # Each process that the server forks keeps it alive by a descriptor of its own, a stopped one for ever.
    server: Any = forkserver._forkserver
    descriptor = getattr(server, "_forkserver_alive_fd", None)
    if isinstance(descriptor, int):
        os.close(descriptor)
        server._forkserver_alive_fd = None
    if wait([parent.sentinel], timeout=0):  # it had ended before that took effect
        os._exit(1)

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="lockstep-parent", daemon=True).start()


def _mark_folder_of_multiprocessing(own: ProcessIdentity) -> None:
    """Say whose the folder is in which multiprocessing keeps its server's socket; it goes with a process that ends."""
    with contextlib.suppress(OSError), _room_for_a_socket():
        marker = Path(util.get_temp_dir(), _MARKER)
        marker.write_text(f"{own.namespace}-{own.pid}-{own.started}\n")


@contextlib.contextmanager
def _room_for_a_socket() -> Iterator[None]:
    """Take /tmp in the block where the path of the temporary folder is too long for a socket, as later Pythons do."""
    before = tempfile.gettempdir()
    if len(os.fsencode(before)) + len("/pymp-01234567/listener-01234567") > _MAX_SOCKET_PATH_BYTES:
        tempfile.tempdir = _SHORT_FOLDER
        _remove_leftovers(Path(_SHORT_FOLDER))
    try:
        yield
    finally:
        tempfile.tempdir = before


def _remove_leftovers(base: Path) -> None:
    """Remove folders of runs whose process is certainly gone, and of them only what a run puts there."""
    for folder in (*base.glob("lockstep-run-*"), *base.glob("pymp-*")):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or not folder.is_dir() or folder.lstat().st_uid != os.getuid():
                continue
            owner = _owner(folder)
            if owner is not None and owner.state() == "gone":
                _remove(folder)


def _owner(folder: Path) -> ProcessIdentity | None:
    """Return which process has made a folder; None for one that no run of ours has made."""
    found = _FOLDER.fullmatch(folder.name)
    if found is None and folder.name.startswith("pymp-"):
        marker = folder / _MARKER
        if marker.is_file() and not marker.is_symlink() and marker.stat().st_size < _MARKER_BYTES:
            found = re.fullmatch(r"(\d+)-(\d+)-(\d+)\n", marker.read_text())
    if found is None:
        return None
    namespace, pid, started = map(int, found.groups())
    return ProcessIdentity(pid, started, namespace)


def _remove(folder: Path) -> None:
    """Remove what a run puts into its folder, and the folder if nothing else is in it."""
    with contextlib.suppress(OSError):
        for path in (folder / STORE, folder / _MARKER, *folder.glob("listener-*")):
            path.unlink(missing_ok=True)
        folder.rmdir()
