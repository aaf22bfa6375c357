"""Write the pages that come from the program: the command line's reference, and the fields of the step log.

python docs/make_reference.py           # write them
python docs/make_reference.py --check   # exit status 1 if one is not up to date
"""

import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import typer

from lockstep.cli import app
from lockstep.steplog import record

PAGES = Path(__file__).parent / "reference"
CLI_INTRODUCTION = """# Command line

Made from the program by `docs/make_reference.py`; `lockstep COMMAND --help` prints the same.

## Exit status

| status | meaning |
|---|---|
| 0 | done and, where outputs were compared, all equal |
| 1 | the run failed, outputs differ, or no setting meets the limits |
| 2 | bad input, said in one sentence |
| 130, 143 | interrupted, terminated: what was written is kept |
"""
BEGIN, END = "<!-- fields: begin -->\n", "<!-- fields: end -->"


def commands(group, name):
    """Yield every command with its full name."""
    for part, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {part}")
        else:
            yield f"{name} {part}", command


def without_none(hint):
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return kinds[0] if len(kinds) < len(get_args(hint)) else hint


def cell(text):
    return " ".join(str(text).split()).replace("|", "\\|")


def value_of(parameter, annotation):
    """Return what an option takes: its names, its metavar, or PATH."""
    if getattr(parameter, "is_flag", False):
        return ""
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    return " | ".join(choices) or parameter.metavar or ("PATH" if "Path" in str(annotation) else "TEXT")


def option_row(parameter, annotation):
    """Return a command's option or argument as a row of its table."""
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if parameter.param_type_name == "argument":
        names = f"`{parameter.name.upper()}`"
    default = parameter.default
    if default is None or isinstance(default, bool):
        default = "on" if default else ""
    cells = (names, value_of(parameter, annotation), default, parameter.help or "")
    return "| " + " | ".join(cell(each) for each in cells) + " |"


def cli_page():
    root = typer.main.get_command(app)
    parts = [CLI_INTRODUCTION]
    for name, command in commands(root, "lockstep"):
        hints = {key: without_none(hint) for key, hint in get_type_hints(command.callback).items()}
        paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
        says = "\n\n".join(textwrap.fill(" ".join(part.split()), 118) for part in paragraphs)
        rows = [
            option_row(parameter, hints.get(parameter.name)) for parameter in command.params if parameter.name != "help"
        ]
        head = ["| option | value | default | meaning |", "|---|---|---|---|"]
        parts.append("\n".join([f"## `{name}`", "", says, "", *head, *rows, ""]))
    return "\n".join(parts)


def fields_table():
    lines = inspect.getsource(record.StepLogRecord).splitlines()
    found = [re.fullmatch(r"    (\w+): [^#]*# (.*)", line) for line in lines]
    rows = [f"| `{match[1]}` | {cell(match[2])} |" for match in found if match]
    assert len(rows) == len(record.FIELDS)
    return "\n".join(["| field | meaning |", "|---|---|", *rows]) + "\n"


def files_page():
    text = (PAGES / "files.md").read_text(encoding="utf-8")
    return text.split(BEGIN)[0] + BEGIN + fields_table() + END + text.split(END)[1]


def main():
    """Write the pages, or compare them."""
    stale = []
    for name, text in (("cli.md", cli_page()), ("files.md", files_page())):
        page = PAGES / name
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in sys.argv:
                page.write_text(text, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"not up to date: {', '.join(stale)}; run python docs/make_reference.py")


if __name__ == "__main__":
    main()
