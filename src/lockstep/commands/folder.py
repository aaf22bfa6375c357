"""A command's output folder: marked as ours, locked while in use, and cleared only of files that we write.

The marker file is also the lock, which the kernel releases when the process ends. `--overwrite` removes only the files
listed below; anything else in the folder stays.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lockstep.errors import ConfigurationError

MARKER = ".lockstep"
_MARKED = b"Lockstep wrote this folder; --overwrite replaces the files that it wrote, and no others.\n"
_TINY = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_FILES = (
    # of a run
    *("outputs.jsonl", "outputs.jsonl.part", "steps.jsonl", "steps.jsonl.part", "summary.json"),
    "expert_load.json",
    *("parts/outputs-rank[0-9]*.jsonl", "parts/tokens-rank[0-9]*.jsonl", "parts/steps-rank[0-9]*.jsonl"),
    *(f"tiny-[0-9]*/{name}" for name in _TINY),
    # of a simulation
    *("settings.json", "settings.csv", "settings.parquet", "steps.parquet", "requests.parquet"),
    # of both
    *("report.html", "trace.json"),
)
_FOLDERS = ("parts", "tiny-[0-9]*")
_EXISTS = "the output folder {} exists: choose another, or pass --overwrite"
_JOIN_S = 10.0
BAD_PATH = {
    *(errno.ENOENT, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG),
    *(errno.ELOOP, errno.EROFS, errno.EINVAL, errno.ENXIO, errno.EILSEQ),
}
"""Errors caused by the given path rather than by the machine."""


@contextlib.contextmanager
def output_folder(path: str | Path, overwrite: bool, joint_run: str = "") -> Iterator[Path]:
    """Create an output folder, or clear it with `overwrite`, and lock it against other commands for the `with` block.

    `joint_run` names a torchrun job whose processes share the folder; the first of them creates or clears it.
    """
    out = Path(path)
    try:
        marker = _take(out, overwrite, joint_run)
    except OSError as error:
        if error.errno in BAD_PATH:
            raise ConfigurationError(f"the output folder {out} cannot be written: {error.strerror}") from None
        raise
    with marker:
        try:
            yield out
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
                error.filename = str(out)  # the system does not name the file of a failed write
            raise


def _take(out: Path, overwrite: bool, joint_run: str) -> BinaryIO:
    """Return the folder's marker, locked while it is open."""
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        if not out.is_dir():
            raise ConfigurationError(f"{out} is no folder, so it is not overwritten") from None
        if not joint_run:  # another process of a joint run may be writing the marker now
            if not overwrite:
                raise ConfigurationError(_EXISTS.format(out)) from None
            _check_ours(out, overwrite)
    # O_NOFOLLOW and no truncation: a link, or somebody else's file of this name, is never written to.
    descriptor = os.open(out / MARKER, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    with contextlib.ExitStack() as stack:
        marker = stack.enter_context(os.fdopen(descriptor, "r+b", buffering=0))
        alone = _lock(marker, out, joint_run)
        if alone and not (joint_run and _said(marker)[1:2] == [joint_run]):
            _check_ours(out, overwrite or not joint_run)
            _clear(out)
            marker.seek(0)
            marker.truncate()
            marker.write(_MARKED + f"process {os.getpid()} on {socket.gethostname()}\n{joint_run}\n".encode())
        if joint_run:
            fcntl.flock(marker, fcntl.LOCK_SH)
            if _said(marker)[1:2] != [joint_run]:
                raise _busy(out, marker)
        stack.pop_all()
    return marker


def _check_ours(out: Path, may_replace: bool) -> None:
    if all(entry.name == MARKER for entry in os.scandir(out)):
        return
    marker = out / MARKER
    if marker.is_symlink() or not marker.is_file() or not marker.read_bytes().startswith(_MARKED):
        raise ConfigurationError(
            f"{out} is not overwritten: it is not empty, and Lockstep did not make it (it has no {MARKER} of ours)"
        )
    if not may_replace:
        raise ConfigurationError(_EXISTS.format(out))


def _lock(marker: BinaryIO, out: Path, joint_run: str) -> bool:
    """Lock the folder; return whether this process is alone in it."""
    until = time.monotonic() + (_JOIN_S if joint_run else 0)
    while True:
        for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH) if joint_run else (fcntl.LOCK_EX,):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(marker, kind | fcntl.LOCK_NB)
                return kind == fcntl.LOCK_EX
        if time.monotonic() > until:
            raise _busy(out, marker)
        time.sleep(0.05)


def _busy(out: Path, marker: BinaryIO) -> ConfigurationError:
    said = _said(marker)
    who = f" ({said[0][:200]})" if said else ""
    return ConfigurationError(
        f"the output folder {out} is being written by another command{who}: wait until it ends, or choose another"
    )


def _said(marker: BinaryIO) -> list[str]:
    """Return the marker's lines about its writer: the process, then the joint run."""
    marker.seek(0)
    return marker.read(4096).removeprefix(_MARKED).decode(errors="replace").splitlines()


def _clear(out: Path) -> None:
    """Remove the files that commands write; links are removed, never followed."""
    for pattern in _FOLDERS:
        for folder in out.glob(pattern):
            if folder.is_symlink():
                folder.unlink()
    for pattern in _FILES:
        for file in out.glob(pattern):
            if file.is_dir() and not file.is_symlink():
                raise ConfigurationError(f"{file} is a folder where a file is to be written: move it away")
            file.unlink()
    for pattern in _FOLDERS:
        for folder in out.glob(pattern):
            with contextlib.suppress(OSError):  # it contains other files
                folder.rmdir()
