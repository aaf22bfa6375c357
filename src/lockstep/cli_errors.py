"""How the command line ends: every error as one sentence about what was typed, with its exit status."""

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
    """Run the command line and end the process: with the status that `cli` documents, and one sentence on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a path may have bytes that are no text
            stream.reconfigure(errors="backslashreplace")
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()
    except (typer.Abort, KeyboardInterrupt):
        status = _INTERRUPTED
    except BrokenPipeError:
        # Whoever reads has had enough, as `head` has. Nothing can be written at the end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except (ConfigurationError, OSError, LockstepError) as error:
        _end(*_sentence(error, app))
    except Exception as error:
        # Typer's errors have a common base, which it has moved between releases; it is known by its name.
        names = [base.__name__ for base in type(error).__mro__]
        if "NoArgsIsHelpError" in names:
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        if "ClickException" not in names:
            raise
        _end(_of_the_line(error.format_message()), 2)  # type: ignore[attr-defined]
    if status == _INTERRUPTED:
        # Python ends by the signal itself, whatever the status, where Ctrl-C came inside of an exec() (dataclasses are
        # made in one), until an exec() has ended well.
        exec("")
        _end("interrupted", status)
    sys.exit(status if isinstance(status, int) else 0)


def _sentence(error: Exception, app: typer.Typer) -> tuple[str, int]:
    """Return what an error of the library or the system says in terms of what was typed, and the exit status."""
    bad_input = isinstance(error, ConfigurationError)
    says = _in_words_of_options(str(error), app)
    if isinstance(error, OSError) and not isinstance(error, LockstepError):
        bad_input, says = error.errno in BAD_PATH, error.strerror or str(error)
        says = f"{error.filename}: {says}" if error.filename is not None else says
    return (says, 2) if bad_input else (f"{type(error).__name__}: {says}", 1)


def _of_the_line(message: str) -> str:
    """Return what Typer says of an option as our other messages say it: `--seed must be >= 0, got -1`."""
    found = re.match(r"Invalid value for '?([^':]+)'?: (?:Value error, )?(.*)", message, re.DOTALL)
    if not found:
        return message
    return f"{found[1]}{' ' if found[2].startswith('must ') else ': '}{found[2]}"


def _in_words_of_options(message: str, app: typer.Typer) -> str:
    """Return the library's message with the options that were typed in place of its parameters."""
    command = typer.main.get_command(app)
    names: dict[str, str] = {}
    for each in getattr(command, "commands", {}).values():
        for parameter in (*each.params, *(p for sub in getattr(each, "commands", {}).values() for p in sub.params)):
            option = next((text for text in parameter.opts if text.startswith("--")), None)
            if option and parameter.name:
                names[parameter.name] = option
    names.update(_LIBRARY_NAMES)
    # A name of several words is a parameter wherever it stands, but for paths and quotations; others begin a message.
    words = "|".join(sorted((name for name in names if "_" in name), key=len, reverse=True))
    message = re.sub(rf"(?<![\w/.'\"`-])({words})(?![\w/.'\"`-])", lambda found: names[found[1]], message)
    first, _, _ = message.partition(" ")
    return names[first] + message[len(first) :] if message.startswith(f"{first} must") and first in names else message


def _end(says: str, status: int) -> NoReturn:
    """Say one sentence on stderr and end; a rank of torchrun's at once."""
    from lockstep.report.terminal import plain

    says = plain(says if len(says) <= _MOST_CHARACTERS else says[:_MOST_CHARACTERS] + "...", keep="")
    sys.stderr.write(f"lockstep: {'' if status == _INTERRUPTED else 'error: '}{says}\n")
    if "RANK" in os.environ and status == 1:
        # Its groups may be in any state, and an orderly end would wait for their peers.
        sys.stderr.flush()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(1)
    sys.exit(status)
