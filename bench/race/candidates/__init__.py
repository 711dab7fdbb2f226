"""Candidates that ship: other ways to compute a layer, to race against the engine's own kernel.

Each file keeps to the contract of `bench/race/candidate.py` and can be copied as a start. What
begins with an underscore is shared by several and is none itself.
"""

from pathlib import Path

SHIPPED = Path(__file__).parent


def shipped() -> list[str]:
    """Their names."""
    return sorted(path.stem for path in SHIPPED.glob("[!_]*.py"))
