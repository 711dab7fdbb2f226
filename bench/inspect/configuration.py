"""Configurations as words on a command line: `BLOCK_M=256,num_stages=4`, or `default`."""

from __future__ import annotations

import types
import typing
from dataclasses import fields, replace
from typing import Any, Literal

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
    hints = typing.get_type_hints(type(config))
    names = [field.name for field in fields(config)]
    changes: dict[str, Any] = {}
    for word in text.split(","):
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals or name not in names:
            raise EngineError(
                f"{step.name}: wanted {DEFAULT} or KEY=VALUE,... with the keys "
                f"{', '.join(names)}; got {word.strip()!r}"
            )
        changes[name] = _value(value, hints[name], f"{step.name}: {name}")
    return replace(config, **changes)


def _value(text: str, kind: Any, what: str) -> Any:
    """`text` as a value of the annotated type `kind`."""
    choices = _choices(kind)
    if text in choices:
        return choices[text]
    if text.lower() in choices:  # Python's True, False and None
        return choices[text.lower()]
    takes_number = kind is int or int in typing.get_args(kind)
    if takes_number and text.isdecimal():
        return int(text)
    legal = [*choices, *(["a whole number"] if takes_number else [])]
    raise EngineError(f"{what}: wanted {' or '.join(legal)}, got {text!r}")


def _choices(kind: Any) -> dict[str, Any]:
    """The words that stand for values of a type: literals, truth values, None."""
    if kind is bool:
        return {"true": True, "false": False}
    if kind is type(None):
        return {"none": None}
    if typing.get_origin(kind) is Literal:
        return {str(value): value for value in typing.get_args(kind)}
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return {word: value for k in typing.get_args(kind) for word, value in _choices(k).items()}
    return {}
