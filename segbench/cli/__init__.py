"""The command line: click commands, and the only code that prints."""

from segbench.cli.app import main

__all__ = ["main"]
