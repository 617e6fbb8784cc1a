"""The command group: lazy commands, options with several values, errors without traceback."""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

import segbench
from segbench.errors import SegbenchError

# Command -> the file that holds it. A command's file is imported only when it runs.
COMMANDS = {
    "models": "zoo",
    "show": "zoo",
    "check-model": "check",
    "publish": "publish",
    "evaluate": "evaluate",
    "status": "runs",
    "merge": "runs",
    "attack": "attack",
    "report": "report",
    "validate": "content",
    "entries": "entries",
    "verify": "content",
    "reproduce": "reproduce",
    "submit": "submit",
    "leaderboard": "board",
    "train": "train",
    "data": "data",
    "selftest": "selftest",
    "env": "env",
}


class Segbench(click.Group):
    """Finds the commands in their files."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(
            importlib.import_module(f"segbench.cli.{COMMANDS[cmd_name]}"), cmd_name.replace("-", "_")
        )
        return command


class ManyValues(click.Command):
    """A command whose ``multiple`` options take several values at once: ``--eps 4 8/255 0.25``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        names = {
            name for param in self.params if isinstance(param, click.Option) and param.multiple for name in param.opts
        }
        spread: list[str] = []
        current = None
        for position, arg in enumerate(args):
            if arg == "--":
                spread += args[position:]
                break
            if arg.startswith("-") and not arg[1:2].isdigit():
                current = arg if arg in names else None
                spread.append(arg)
            elif current is not None and spread[-1] != current:
                spread += [current, arg]
            else:
                spread.append(arg)
        return super().parse_args(ctx, spread)


@click.group(
    cls=Segbench,
    context_settings={"auto_envvar_prefix": "SEGBENCH", "help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(segbench.__version__, prog_name="segbench")
def app() -> None:
    """Robustness of semantic segmentation, measured by a fixed protocol.

    Each option can be set by a variable: --device of evaluate is SEGBENCH_EVALUATE_DEVICE.
    """


def find_own_modules(model: str) -> None:
    """``--model module:function`` also finds files in the current folder."""
    if ":" in model and "" not in sys.path:
        sys.path.append("")


def print_json(data: Any) -> None:
    """Data on standard output."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; columns whose name starts with ``>`` are right-aligned."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    for name in columns:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console()
    console.print(table) if console.is_terminal else Console(width=160).print(table)


def printable(text: str, *, keep: str = "") -> str:
    """Text of strangers without control characters but those in ``keep``, harmless in a terminal."""
    return "".join(char if char.isprintable() or char in keep else "?" for char in text)


def note(text: str) -> None:
    """A message for people, on standard error."""
    click.echo(text, err=True)


def fail(message: str, code: int) -> NoReturn:
    """Ends with a message."""
    note(printable(f"Error: {message}", keep="\n"))
    sys.exit(code)


class _Printable(logging.Formatter):
    """Messages of the library, which may quote names from files of strangers."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n")


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; exit codes: 0 done, 1 failed, 2 usage, 3 incomplete, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show ε shows ?
    log, handler = logging.getLogger("segbench"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable())
    log.addHandler(handler)
    try:
        code = app.main(args=args, prog_name="segbench", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        fail("interrupted. What is finished is kept: run the same command again to continue.", 130)
    except SegbenchError as error:
        fail(str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads; say nothing at exit either
        sys.exit(1)
    except OSError as error:
        fail(f"the system refuses: {error}", 1)
    finally:
        log.removeHandler(handler)
    sys.exit(code if isinstance(code, int) else 0)
