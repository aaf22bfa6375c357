"""`python -m lockstep`, and what the command `lockstep` starts: the command line, where its packages are installed."""

from lockstep.extras import require


def main() -> None:
    """Run the command line."""
    require("typer", "rich")
    from lockstep.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
