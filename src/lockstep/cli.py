"""The command `lockstep`. Each command imports what it needs when it runs, so that help is instant.

Exit status: 0 done (and, where outputs were compared, all equal); 1 the run failed or outputs differ; 2 bad input;
130 interrupted (what was written is kept).
"""

import sys
from typing import Annotated

import typer

app = typer.Typer(
    name="lockstep",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mixture-of-Experts models over ranks with uneven work: run, plan, simulate, see.",
)


def _print_version(value: bool) -> None:
    if value:
        from lockstep._version import __version__

        typer.echo(f"lockstep {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


def main() -> None:
    """Run the command line; a `ConfigurationError` or unreadable path becomes one sentence and exit status 2."""
    from lockstep.errors import ConfigurationError, LockstepError

    try:
        app()
    except (ConfigurationError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        typer.echo(f"lockstep: error: {error}", err=True)
        sys.exit(2)
    except LockstepError as error:
        typer.echo(f"lockstep: error: {type(error).__name__}: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
