"""How the command line ends: every error as one sentence about what was typed, and its exit status."""

import contextlib
import os
import re
import sys
from typing import NoReturn

import typer

from lockstep.commands.folder import BAD_PATH
from lockstep.errors import ConfigurationError, LockstepError

# Options whose name in the library is not their parameter's.
_LIBRARY_NAMES = {"num_ranks": "--data-parallel-size", "num_tokens_across_dp": "--tokens"}
_MOST_CHARACTERS = 4000
_INTERRUPTED = 130


def run_to_status(app: typer.Typer) -> NoReturn:
    """Run the command line and end the process with the status that `cli` documents."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # paths may hold bytes that are not text
            stream.reconfigure(errors="backslashreplace")
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()
    except (typer.Abort, KeyboardInterrupt):
        status = _INTERRUPTED
    except BrokenPipeError:
        # The reader has closed the pipe, as `head` does; nothing may be flushed at the end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except (ConfigurationError, OSError, LockstepError) as error:
        _end(*_sentence(error, app))
    except Exception as error:
        # The base class of Typer's errors has moved between releases, so it is found by name.
        names = [base.__name__ for base in type(error).__mro__]
        if "NoArgsIsHelpError" in names:
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        if "ClickException" not in names:
            raise
        _end(_of_the_line(error.format_message()), 2)  # type: ignore[attr-defined]
    if status == _INTERRUPTED:
        # After a Ctrl-C inside an exec() (dataclasses are made in one), Python would end by the signal, whatever the
        # status, until another exec() has succeeded.
        exec("")
        _end("interrupted", status)
    sys.exit(status if isinstance(status, int) else 0)


def _sentence(error: Exception, app: typer.Typer) -> tuple[str, int]:
    """Return an error of the library or the system in terms of what was typed, and the exit status."""
    bad_input = isinstance(error, ConfigurationError)
    says = _in_words_of_options(str(error), app)
    if isinstance(error, OSError) and not isinstance(error, LockstepError):
        bad_input, says = error.errno in BAD_PATH, error.strerror or str(error)
        says = f"{error.filename}: {says}" if error.filename is not None else says
    return (says, 2) if bad_input else (f"{type(error).__name__}: {says}", 1)


def _of_the_line(message: str) -> str:
    """Return Typer's message about an option in our own form: `--seed must be >= 0, got -1`."""
    found = re.match(r"Invalid value for '?([^':]+)'?: (?:Value error, )?(.*)", message, re.DOTALL)
    if not found:
        return message
    return f"{found[1]}{' ' if found[2].startswith('must ') else ': '}{found[2]}"


def _in_words_of_options(message: str, app: typer.Typer) -> str:
    """Return the library's message with its parameters replaced by the options that were typed."""
    command = typer.main.get_command(app)
    names: dict[str, str] = {}
    for each in getattr(command, "commands", {}).values():
        for parameter in (*each.params, *(p for sub in getattr(each, "commands", {}).values() for p in sub.params)):
            option = next((text for text in parameter.opts if text.startswith("--")), None)
            if option and parameter.name:
                names[parameter.name] = option
    names.update(_LIBRARY_NAMES)
    # Names with underscores are replaced everywhere but in paths and quotations, other names at the beginning only.
    words = "|".join(sorted((name for name in names if "_" in name), key=len, reverse=True))
    message = re.sub(rf"(?<![\w/.'\"`-])({words})(?![\w/.'\"`-])", lambda found: names[found[1]], message)
    first, _, _ = message.partition(" ")
    begins = message[len(first) :].startswith((" must ", " is "))
    return names[first] + message[len(first) :] if begins and first in names else message


def _end(says: str, status: int) -> NoReturn:
    """Print one sentence on stderr and end; under torchrun, at once."""
    from lockstep.report.terminal import plain

    says = plain(says if len(says) <= _MOST_CHARACTERS else says[:_MOST_CHARACTERS] + "...", keep="")
    sys.stderr.write(f"lockstep: {'' if status == _INTERRUPTED else 'error: '}{says}\n")
    if "RANK" in os.environ and status == 1:
        # The process groups may be in any state; an orderly exit would wait for their peers.
        sys.stderr.flush()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(1)
    sys.exit(status)
