"""A pickle of tensors and plain containers, read by an interpreter that knows nothing else.

A pickle is a program. `torch.load(weights_only=True)` takes dangerous words from it but runs the
rest: a tuple of tuples as a dictionary's key crashes Python, sixty tuples that hold each other
twice never end, a storage may be smaller than its tensor says. Here each opcode does only what a
checkpoint needs, and costs the same however often what it works on is used again:

- no name in a pickle is ever imported: it is looked up in `NAMES`, by what torch.save writes;
- what need not be read is `Unbuilt`: kinds of tensors that are no weights, and keys that are
  neither strings nor small whole numbers, so nothing nested is hashed, and no hashes collide;
- nothing that a pickle makes gets an attribute;
- a call has few arguments, a tensor few dimensions, and a list becomes a dictionary only once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pickle import UnpicklingError
from pickletools import genops
from types import FunctionType
from typing import IO, Any

import torch

MAX_OPCODES = 2_000_000  # ten seconds at worst; a tensor takes about fifty
MAX_PROTOCOL = 3  # torch.save writes 2 unless told
MAX_ARGUMENTS = 8  # what _rebuild_tensor_v3 takes
MAX_DIMENSIONS = 64
MAX_KEY = 2**60  # larger whole numbers share their hashes
_COUNTED = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}
_BUILTINS = ("set", "bytearray", "complex")
_VALUES = torch.dtype | torch.qscheme
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


@dataclass(frozen=True, slots=True, eq=False)
class Unbuilt:
    """Stands for what was neither built nor looked into; equal to itself alone."""

    kind: str


def unpickled(file: IO[bytes], storage: Callable[[Any], torch.Tensor]) -> Any:
    """What the pickle at the position of `file` holds; `file` is left behind its end.

    `storage` makes a flat tensor of a persistent id, which is what torch.save leaves in a pickle
    for the values of a tensor. Dictionaries, lists, tuples, strings and numbers come out as such.
    Sets, sizes and devices come out as tuples: nobody looks for weights in them. Sparse, quantised
    and other tensors that are no weights come out as `Unbuilt`, as do odd keys.

    Raises UnpicklingError for an opcode or a name that no checkpoint of tensors needs, with a cure
    as its second argument where it has one of its own; and nearly anything, as other parsers do,
    for broken bytes.
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
            case "EMPTY_LIST" | "EMPTY_DICT":
                stack.append([] if opcode.name == "EMPTY_LIST" else {})
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
                stack.append(_called(function, arguments))
            case "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            case "BINPERSID":
                stack.append(storage(stack.pop()))
            case "PROTO" if value > MAX_PROTOCOL:
                raise UnpicklingError(
                    f"its pickle is of protocol {value}", "save it with torch's own pickle_protocol"
                )
            case "PROTO" | "STOP":
                pass
            case other:
                raise UnpicklingError(
                    f"its pickle has the opcode {other}, which torch.save does not use unless told"
                )
    [result] = stack
    return result


def _called(function: object, arguments: object) -> object:
    if not isinstance(function, FunctionType) or not isinstance(arguments, tuple):
        raise UnpicklingError("its pickle calls what is no function of torch")
    if len(arguments) > MAX_ARGUMENTS:
        raise UnpicklingError(f"a call in its pickle has {len(arguments)} arguments")
    return function(*arguments)


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
            key = Unbuilt(type(key).__name__)
        if key in target:
            raise UnpicklingError(f"its pickle holds {key!r} twice")
        target[key] = value


def _build(target: object, state: Any) -> None:
    """What the opcode BUILD may do: nothing, or fill the empty tensor of a file before 2018."""
    match target, state:
        case dict(), dict():  # of an OrderedDict: the versions of modules, and whatever was set
            pass
        case torch.Tensor(), (bool(), _, _):  # of a Parameter: requires_grad, volatile, hooks
            pass
        case torch.Tensor(), (data, _, _, _, _):  # of a Parameter that was made empty
            target.data = data
        case torch.Tensor(), (storage, offset, size, stride):
            target.data = _tensor(storage, offset, size, stride)  # type: ignore[assignment]
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
) -> torch.Tensor | Unbuilt:
    """A view of a storage; torch refuses one that leaves it."""
    if metadata:
        return Unbuilt("a negated or conjugated view")
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
) -> torch.Tensor | Unbuilt:
    if dtype not in _VIEWED:  # of others torch may crash
        return Unbuilt(f"a tensor of {dtype}")
    return _tensor(storage.view(dtype), offset, size, stride, metadata=metadata)


def _parameter(data: torch.Tensor | None = None, *_: object) -> torch.Tensor:
    return torch.empty(0) if data is None else data


def _from_type(function: object, kind: object, arguments: object, state: object) -> object:
    """A tensor with attributes, which it does not get."""
    if function is _from_type:
        raise UnpicklingError("a tensor in it is made of calls in calls")
    return _called(function, arguments)


def _unbuilt(kind: str) -> Callable[..., Unbuilt]:
    return lambda *_: Unbuilt(kind)


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
    "QInt8": torch.int8,  # quantised numbers without their scale
    "QInt32": torch.int32,
    "QUInt8": torch.uint8,
    "QUInt4x2": torch.uint8,
    "QUInt2x4": torch.uint8,
}
STORED = frozenset(_STORAGES.values())

# The dtypes without a storage of their own that hold one number each.
_VIEWED = {
    *(torch.uint16, torch.uint32, torch.uint64, torch.complex32),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    torch.float8_e8m0fnu,
}

# What a name in a pickle stands for: a dtype, or a function of this file.
NAMES: dict[str, Any] = {
    **{f"torch {kind}Storage": dtype for kind, dtype in _STORAGES.items()},
    **{f"torch {kind}Tensor": _parameter for kind in _STORAGES},
    **{f"torch {name}": v for name, v in vars(torch).items() if isinstance(v, _VALUES)},
    "torch.storage UntypedStorage": torch.uint8,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_v3,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
    "torch._utils _rebuild_sparse_tensor": _unbuilt("a sparse tensor"),
    "torch._utils _rebuild_qtensor": _unbuilt("a quantised tensor"),
    "torch._utils _rebuild_meta_tensor_no_storage": _unbuilt("a meta tensor"),
    "torch._utils _rebuild_nested_tensor": _unbuilt("a nested tensor"),
    "torch._tensor _rebuild_from_type_v2": _from_type,
    "torch.nn.parameter Parameter": _parameter,
    "collections OrderedDict": _ordered,
    **dict.fromkeys(("collections Counter", "torch Size", "torch device", "torch Tensor"), _inert),
    **dict.fromkeys(("torch.serialization _get_layout", "_codecs encode"), _inert),
    **{f"{m} {n}": _inert for m in ("__builtin__", "builtins") for n in _BUILTINS},
}
