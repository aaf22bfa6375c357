"""The command `lockstep`. Each command imports what it needs when it runs, so that help is instant.

Exit status: 0 done (and, where outputs were compared, all equal); 1 the run failed or outputs differ; 2 bad input;
130 interrupted (what was written is kept).
"""

import json
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


@app.command()
def plan(
    tokens: Annotated[str, typer.Option(help="Tokens of each data-parallel rank, such as 500,200,256.")],
    max_chunk_size: Annotated[
        int | None, typer.Option(help="Most rows that one rank brings per chunk; without it, one chunk.")
    ] = None,
    sp: Annotated[int, typer.Option(help="Ranks that share the tokens of one data-parallel rank.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> None:
    """Show the sizes and the chunks of one step, without running it."""
    from lockstep.errors import ConfigurationError, TokenCountError
    from lockstep.report.plan import parse_tokens, plan_document, print_plan

    try:
        document = plan_document(parse_tokens(tokens), sp, max_chunk_size)
    except TokenCountError as error:
        # Here a wrong count is what somebody typed, and so ends like any other bad option.
        raise ConfigurationError(str(error)) from None
    if as_json:
        typer.echo(json.dumps(document))
    else:
        print_plan(document)


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
