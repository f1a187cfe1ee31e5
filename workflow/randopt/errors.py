"""The errors a user is meant to read."""

from collections.abc import Iterable
from dataclasses import dataclass


class UserError(Exception):
    """Bad input or a bad state that the user can mend.

    The message says what was given, what was expected and what to do. The command prints it
    without a traceback and exits with code 2; the Snakefile passes it on as a WorkflowError.
    """


@dataclass(frozen=True)
class Mistake:
    """One mistake in a file of keys: what to read about it, and the keys that lead to it."""

    text: str
    path: tuple[str | int, ...] = ()
    line: int | None = None  # of the file, from 1

    def __str__(self) -> str:
        return self.text if self.line is None else f"{self.text} (line {self.line})"


class Mistakes(UserError):
    """All the mistakes in one thing, told at once."""

    def __init__(self, where: str, mistakes: Iterable[Mistake]) -> None:
        self.mistakes = list(mistakes)
        listing = "".join(f"\n  - {mistake}" for mistake in self.mistakes)
        one = len(self.mistakes) == 1
        super().__init__(f"{where}: {self.mistakes[0]}" if one else f"{where} cannot be used:{listing}")
