"""One problem as a source makes it, before it becomes an item."""

import unicodedata
from dataclasses import dataclass, field
from typing import Any

from randopt.canonical import short_hash


@dataclass(frozen=True)
class Row:
    """`problem` is what makes two rows the same problem; `variant` tells apart the ways to ask it."""

    problem: Any  # JSON
    fields: dict[str, Any]  # column -> value, for the prompt
    reference: Any  # JSON, what the scorer compares with
    meta: dict[str, Any] = field(default_factory=dict)
    variant: str = ""

    @property
    def content_hash(self) -> str:
        """16 hex digits of the SHA-256 of the problem: no problem may be in two splits."""
        return short_hash(self.problem, 16)


def normalised(text: str) -> str:
    """Text without what makes no other question of it: Unicode spelling, letter case, white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
