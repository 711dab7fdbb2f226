"""Configurations as words on a command line: `BLOCK_M=256,num_stages=4`, or `default`."""

from __future__ import annotations

import typing
from dataclasses import fields, replace
from typing import Any

from ...engine import EngineError
from ...engine.plan import KernelConfig, Step

DEFAULT = "default"


def parse(text: str, step: Step) -> KernelConfig:
    """The configuration of `step` with the fields that `text` names changed.

    Raises EngineError, naming the field and what it takes, for an unknown field or a wrong value.
    """
    config = step.config
    if config is None:
        raise EngineError(f"{step.name}: no kernel does this step, so it has no configuration")
    if text.strip() == DEFAULT:
        return config
    kinds = typing.get_type_hints(type(config))
    names = [field.name for field in fields(config)]
    changes: dict[str, Any] = {}
    for word in text.split(","):
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals or name not in names:
            raise EngineError(
                f"{step.name}: wanted {DEFAULT} or KEY=VALUE,... with the keys "
                f"{', '.join(names)}; got {word.strip()!r}"
            )
        words: dict[str, Any] = {"true": True, "false": False} if kinds[name] is bool else {}
        words |= {str(choice): choice for choice in typing.get_args(kinds[name])}
        if not words and value.isdecimal():
            words[value] = int(value)
        if value not in words:
            legal = " or ".join(words) or "a whole number"
            raise EngineError(f"{step.name}: {name}: wanted {legal}, got {value!r}")
        changes[name] = words[value]
    return replace(config, **changes)
