"""What every refusal has in common. It lies under all floors and imports none of them."""

from __future__ import annotations


class Error(Exception):
    """A refusal of this package: one line that says what, where, wanted, got and the cure."""
