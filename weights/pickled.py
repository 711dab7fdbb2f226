"""A pickle of tensors and plain containers, read by an interpreter that knows nothing else.

A pickle is a program. `torch.load(weights_only=True)` takes dangerous words from it but runs the
rest: a tuple of tuples as a dictionary's key crashes Python, sixty tuples that hold each other
twice never end, a storage may be smaller than its tensor says. Here each opcode does only what a
checkpoint needs, and costs the same however often what it works on is used again:

- no name in a pickle is ever imported: it is looked up in `NAMES`, by what torch.save writes;
- keys are strings and small whole numbers, so nothing nested is hashed, and no hashes collide;
- nothing that a pickle makes gets an attribute;
- a call has few arguments, a tensor few dimensions, and a list becomes a dictionary only once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pickle import UnpicklingError
from pickletools import genops
from types import FunctionType
from typing import IO, Any

import torch

MAX_OPCODES = 1_000_000  # a tensor takes about fifty
MAX_ARGUMENTS = 8  # what _rebuild_tensor_v3 takes
MAX_DIMENSIONS = 64
MAX_KEY = 2**60  # larger whole numbers share their hashes
_COUNTED = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def unpickled(file: IO[bytes], storage: Callable[[Any], torch.Tensor]) -> Any:
    """What the pickle at the position of `file` holds; `file` is left behind its end.

    `storage` makes a flat tensor of a persistent id, which is what torch.save leaves in a pickle
    for the values of a tensor. Dictionaries, lists, tuples, strings and numbers come out as such.
    Sets, sizes and devices come out as tuples: nobody looks for weights in them.

    Raises UnpicklingError for an opcode or a name that no checkpoint of tensors needs, and nearly
    anything, as other parsers do, for broken bytes.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stack under each MARK
    memo: dict[int, Any] = {}
    value: Any
    for count, (opcode, value, _) in enumerate(genops(file)):
        if count >= MAX_OPCODES:
            raise UnpicklingError(f"its pickle has more than {MAX_OPCODES} opcodes")
        match opcode.name:
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "BINUNICODE" | "SHORT_BINSTRING" | "BININT" | "BININT1" | "BININT2":
                stack.append(value)
            case "BINFLOAT" | "LONG1":
                stack.append(value)
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(_CONSTANTS[opcode.name])
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                below.append(stack)
                stack = []
            case "TUPLE" | "APPENDS" | "SETITEMS":
                items, stack = stack, below.pop()
                _take(stack, opcode.name, items)
            case "TUPLE1" | "TUPLE2" | "TUPLE3" | "APPEND" | "SETITEM":
                items = [stack.pop() for _ in range(_COUNTED[opcode.name])]
                _take(stack, opcode.name, items[::-1])
            case "GLOBAL":
                if value not in NAMES:
                    raise UnpicklingError(f"its pickle asks for {value.replace(' ', '.')}")
                stack.append(NAMES[value])
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                if not isinstance(function, FunctionType) or not isinstance(arguments, tuple):
                    raise UnpicklingError("its pickle calls what is no function of torch")
                if len(arguments) > MAX_ARGUMENTS:
                    raise UnpicklingError(f"a call in its pickle has {len(arguments)} arguments")
                stack.append(function(*arguments))
            case "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            case "BINPERSID":
                stack.append(storage(stack.pop()))
            case "PROTO" | "STOP":
                pass
            case other:
                raise UnpicklingError(
                    f"its pickle has the opcode {other}, which torch.save does not use"
                )
    [result] = stack
    return result


def _take(stack: list[Any], opcode: str, items: list[Any]) -> None:
    if opcode.startswith("TUPLE"):
        stack.append(tuple(items))
    elif opcode.startswith("SETITEM"):
        _put(stack[-1], zip(items[::2], items[1::2], strict=True))
    elif isinstance(stack[-1], list):
        stack[-1].extend(items)
    else:
        raise UnpicklingError("its pickle appends to what is no list")


def _put(target: object, items: Iterable[tuple[Any, Any]]) -> None:
    if not isinstance(target, dict):
        raise UnpicklingError("its pickle puts a key into what is no dictionary")
    for key, value in items:
        if not isinstance(key, str | int | None) or (isinstance(key, int) and abs(key) > MAX_KEY):
            raise UnpicklingError(
                f"a key in its pickle is no name, but of type {type(key).__name__}"
            )
        if key in target:
            raise UnpicklingError(f"its pickle holds {key!r} twice")
        target[key] = value


def _build(target: object, state: Any) -> None:
    """What the opcode BUILD may do: nothing, or fill the empty tensor of a file before 2018."""
    match target, state:
        case dict(), dict() if list(state) == ["_metadata"]:  # of torch's modules: their versions
            pass
        case torch.Tensor(), (_, _, _):  # of a Parameter: requires_grad, volatile, hooks
            pass
        case torch.Tensor(), (data, _, _, _, _):  # of a Parameter that was made empty
            target.data = data
        case torch.Tensor(), (storage, offset, size, stride):
            target.data = _tensor(storage, offset, size, stride)
        case _:
            raise UnpicklingError("its pickle sets attributes")


def _ordered(items: object = ()) -> dict[Any, Any]:
    ordered: dict[Any, Any] = {}
    if isinstance(items, list):  # of pairs, as Python 2 wrote it
        _put(ordered, items)
        items.clear()
    elif items != ():
        raise UnpicklingError("its pickle makes an OrderedDict of no list")
    return ordered


def _tensor(
    storage: torch.Tensor,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: object = None,
    hooks: object = None,
    metadata: object = None,
) -> torch.Tensor:
    """A view of a storage; torch refuses one that leaves it."""
    if metadata:  # says that the values are meant negated or conjugated
        raise UnpicklingError("a tensor in it is a negated view")
    if len(size) > MAX_DIMENSIONS:
        raise UnpicklingError(f"a tensor in it has {len(size)} dimensions")
    return storage.as_strided(size, stride, storage.storage_offset() + offset)


def _tensor_v3(
    storage: torch.Tensor,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: object,
    hooks: object,
    dtype: torch.dtype,
    metadata: object = None,
) -> torch.Tensor:
    return _tensor(storage.view(dtype), offset, size, stride, metadata=metadata)


def _parameter(data: torch.Tensor | None = None, *_: object) -> torch.Tensor:
    return torch.empty(0) if data is None else data


def _inert(*arguments: object) -> object:
    return arguments


_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
}

# What a name in a pickle stands for: a dtype, or a function of this file.
NAMES: dict[str, Any] = {
    **{f"torch {kind}Storage": dtype for kind, dtype in _STORAGES.items()},
    **{f"torch {kind}Tensor": _parameter for kind in _STORAGES},
    **{f"torch {name}": dtype for name, dtype in vars(torch).items() if type(dtype) is torch.dtype},
    "torch.storage UntypedStorage": torch.uint8,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_v3,
    "torch._utils _rebuild_parameter": _parameter,
    "torch.nn.parameter Parameter": _parameter,
    "collections OrderedDict": _ordered,
    "collections Counter": _inert,
    "torch Size": _inert,
    "torch device": _inert,
    "_codecs encode": _inert,
    "__builtin__ set": _inert,
    "__builtin__ bytearray": _inert,
    "__builtin__ complex": _inert,
}
