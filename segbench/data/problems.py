"""Errors about the numbers in a file, which `data check` joins over files: one line for all that need the same edit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from segbench.errors import DataError

Say = Callable[[Sequence[int]], str]


class NumbersError(DataError):
    """A file holds numbers that have no meaning.

    Attributes:
        kind: files of one kind are reported together.
        numbers: those of this file.
        say: maps numbers, of one file or of many, to a message with the edit that fixes them.
    """

    def __init__(self, text: str, kind: str = "", numbers: Sequence[int] = (), say: Say | None = None) -> None:
        super().__init__(text)
        self.kind = kind
        self.numbers = tuple(numbers)
        self.say = say


def numbers_error(where: str, kind: str, numbers: Sequence[int], say: Say) -> NumbersError:
    """The error of one file, which ``where`` names."""
    return NumbersError(f"{where}: {say(numbers)}", kind, numbers, say)
