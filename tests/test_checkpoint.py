"""Files of torch.save: real ones load as torch loads them, hostile and damaged ones are refused.

A hostile pickle is written here opcode by opcode. What crashed Python, or never ended, in a
restricted unpickler must be refused before any of it is built, so all of it may run in-process.
"""

from __future__ import annotations

import pickle
import random
import struct
import warnings
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import pytest
import torch
from alexnet_triton.errors import LONGEST
from alexnet_triton.weights import WeightsError, checkpoint, load, pickled
from safetensors.torch import save_file

State = dict[str, torch.Tensor]

EXPECTED = {"w": (2, 2), "b": (2,)}
WANTED = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([5.0, 6.0])}
VALUES = struct.pack("<6f", *range(1, 7))


def loaded(source: object) -> State:
    return load(source, EXPECTED, network="tiny")  # type: ignore[arg-type]


def refused(source: object) -> str:
    """The one line that `load` refuses `source` in."""
    with pytest.raises(WeightsError) as caught:
        loaded(source)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) <= LONGEST
    assert "cure: " in message
    return message


both_formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "row"])


def assert_wanted(state: Mapping[str, torch.Tensor]) -> None:
    assert all(torch.equal(state[name], WANTED[name]) for name in WANTED)


# Pickles by hand


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)


def name(dotted: str) -> bytes:
    return "c{}\n{}\n".format(*dotted.rsplit(".", 1)).encode()


def group(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def dictionary(*items: bytes) -> bytes:
    return b"}(" + b"".join(items) + b"u"


def stored(
    key: str = "0", numel: int = 6, kind: str = "torch.FloatStorage", cut: bytes = b"N"
) -> bytes:
    """A storage in the format before 2020."""
    return group(text("storage"), name(kind), text(key), text("cpu"), number(numel), cut) + b"Q"


def record(key: str = "0", numel: int = 6) -> bytes:
    """A storage in a zip archive."""
    identity = text("storage") + name("torch.FloatStorage") + text(key) + text("cpu")
    return group(identity, number(numel)) + b"Q"


def tensor(
    storage: bytes,
    offset: int = 0,
    size: Iterable[int] = (2, 2),
    stride: Iterable[int] = (2, 1),
    *rest: bytes,
    function: str = "torch._utils._rebuild_tensor_v2",
) -> bytes:
    view = (group(*map(number, size)), group(*map(number, stride)))
    rest = rest or (b"\x89", name("collections.OrderedDict") + b")R")
    return name(function) + group(storage, number(offset), *view, *rest) + b"R"


def state_of(storage: bytes, w: bytes = b"") -> bytes:
    b = tensor(storage, 4, [2], [1])
    return dictionary(text("w"), w or tensor(storage), text("b"), b)


def beside(other: bytes) -> bytes:
    """What stands where nobody looks for weights, but for `other` that is fine."""
    return dictionary(text("state_dict"), state_of(record()), text("other"), other)


def archive(path: Path, body: bytes, compression: int = ZIP_STORED, **records: bytes) -> Path:
    with ZipFile(path, "w", compression) as file:
        file.writestr("a/data.pkl", b"\x80\x02" + body + b".")
        for key, content in ({"data/0": VALUES, "version": b"3\n"} | records).items():
            file.writestr(f"a/{key}", content)
    return path


def row(
    path: Path,
    body: bytes,
    keys: bytes = b"](" + text("0") + b"e",
    raw: bytes = struct.pack("<q", 6) + VALUES,
    little: bytes = b"\x88",
) -> Path:
    """The format before 2020."""
    start = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    system = dictionary(text("little_endian"), little)
    pickles = b"".join(b"\x80\x02" + each + b"." for each in (system, body, keys))
    path.write_bytes(start + pickles + raw)
    return path


# Real files


def training() -> dict[str, Any]:
    """What a training script saves: the state dict, and plain data of every kind."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    groups = [{"lr": 0.1, "betas": (0.9, 0.999), "foreach": None, "params": [0, 1]}] * 2
    return {
        "state_dict": net.state_dict(),
        "parameters": dict(net.named_parameters()),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": groups},
        "values": (3, -5, 2**70, 0.73, "ü", None, [True, False], {1: ()}),
        "random": torch.get_rng_state(),
    }


def views() -> dict[str, torch.Tensor]:
    base = torch.arange(100.0)
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.int64)
    return {
        "cut": base[10:20],
        "turned": base.view(10, 10).T,
        "every third": base[::3],
        "expanded": torch.ones(1).expand(7),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.0),
        "pixels innermost": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        **{str(dtype): torch.arange(5).to(dtype) for dtype in dtypes},
    }


def assert_equal(actual: Any, wanted: Any) -> None:
    if isinstance(wanted, torch.Tensor):
        assert actual.dtype == wanted.dtype
        assert actual.stride() == wanted.stride()
        assert torch.equal(actual, wanted)
    elif isinstance(wanted, dict):
        assert list(actual) == list(wanted)
        for key in wanted:
            assert_equal(actual[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert type(actual) is type(wanted)
        for one, other in zip(actual, wanted, strict=True):
            assert_equal(one, other)
    else:
        assert type(actual) is type(wanted)
        assert actual == wanted


@both_formats
@pytest.mark.parametrize("content", [training, views, dict])
def test_what_torch_saves_loads_as_torch_loads_it(
    content: Any, zipped: bool, tmp_path: Path
) -> None:
    torch.save(content(), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    wanted = torch.load(tmp_path / "a.pth", weights_only=True)
    assert_equal(checkpoint.read(tmp_path / "a.pth"), wanted)


@pytest.mark.filterwarnings("ignore")  # a kind of tensor is deprecated, another a prototype
def test_tensors_that_are_no_weights_stand_where_nobody_looks(tmp_path: Path) -> None:
    numbers = torch.ones(2, 3, dtype=torch.complex64)
    others = {
        "sparse": torch.eye(2).to_sparse(),
        "compressed": torch.eye(2).to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.quint8),
        "channels": torch.quantize_per_channel(
            torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.quint4x2
        ),
        "meta": torch.ones(2, 2, device="meta"),
        "conjugated": numbers.conj(),
        "negated": numbers.conj().imag,
        "nested": torch.nested.nested_tensor([torch.ones(2)]),
        "halves of bytes": torch.ones(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    }
    for name, tensor in others.items():
        torch.save({"state_dict": WANTED, "other": tensor}, tmp_path / "a.pth")
        assert_wanted(loaded(tmp_path / "a.pth"))
        torch.save(WANTED | {"w": tensor}, tmp_path / "a.pth")
        assert "'w'" in refused(tmp_path / "a.pth"), name


@both_formats
def test_attributes_are_left_out(zipped: bool, tmp_path: Path) -> None:
    parameter, tensor = torch.nn.Parameter(WANTED["w"].clone()), WANTED["b"].clone()
    parameter.tag = tensor.tag = 1  # type: ignore[attr-defined]
    state = OrderedDict(w=parameter, b=tensor)
    state.extra = {"x": 1}  # type: ignore[attr-defined]
    for content in (state, {"w": parameter, "b": torch.nn.Buffer(WANTED["b"])}):
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        read = checkpoint.read(tmp_path / "a.pth")
        assert_wanted(read)
        assert not any(vars(each) for each in read.values())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 3")
@pytest.mark.parametrize("protocol", [2, 3])
def test_plain_data_of_every_kind(protocol: int, tmp_path: Path) -> None:
    """What is no weight is no reason to refuse what is."""
    odd = {1.5: 0, -0.1: 1, 2**70: 2, (1, "a", None): 3, (): 4, True: 5}
    others = [odd, {1}, 1j, torch.strided, torch.per_tensor_affine, torch.half, Counter([30])]
    others += [torch.Size([1]), torch.device("cuda:0"), *[b"\xff"][: protocol == 2]]
    content = {"state_dict": WANTED, "args": others}
    torch.save(content, tmp_path / "a.pth", pickle_protocol=protocol)
    assert_wanted(loaded(tmp_path / "a.pth"))
    keys = list(checkpoint.read(tmp_path / "a.pth")["args"][0])
    assert [key.kind for key in keys[:5]] == ["float", "float", "int", "tuple", "tuple"]
    assert keys[5:] == [True]


@both_formats
def test_a_later_protocol_has_another_cure(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(WANTED, path, pickle_protocol=4, _use_new_zipfile_serialization=zipped)
    assert "pickle_protocol" in refused(path)


def test_an_archive_without_checksums_has_another_cure(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(WANTED, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert "set_crc32_options" in refused(tmp_path / "a.pth")


DTYPES = sorted({str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)})


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_that_no_storage_has(dtype: str, tmp_path: Path) -> None:
    """Of some, torch builds a tensor that crashes Python."""
    size = getattr(torch, dtype.removeprefix("torch.")).itemsize
    path, raw = tmp_path / "a.pth", bytes(4 * size)
    typed = record(numel=4).replace(name("torch.FloatStorage"), name(dtype))
    untyped = record(numel=len(raw)).replace(
        name("torch.FloatStorage"), name("torch.storage.UntypedStorage")
    )
    view = "torch._utils._rebuild_tensor_v3"
    for body in (
        tensor(typed, 0, [4], [1]),
        tensor(untyped, 0, [4], [1], b"\x89N", name(dtype), function=view),
    ):
        archive(path, dictionary(text("w"), body), ZIP_STORED, **{"data/0": raw})
        try:
            read = checkpoint.read(path)["w"]
        except pickle.UnpicklingError:
            continue
        if isinstance(read, torch.Tensor):
            assert str(read.dtype) == dtype
            assert read.clone().view(torch.uint8).tolist() == [0] * len(raw)


def test_a_dtype_without_a_storage_of_its_own(tmp_path: Path) -> None:
    torch.save({n: t.to(torch.float8_e4m3fn) for n, t in WANTED.items()}, tmp_path / "a.pth")
    assert_wanted(loaded(tmp_path / "a.pth"))


OLD = tensor(stored(), 0, (2, 2), (2, 1), function="torch._utils._rebuild_tensor")
OLD = OLD.replace(b"\x89" + name("collections.OrderedDict") + b")R", b"")
PARAMETER = name("torch.nn.parameter.Parameter")
SET = group(stored(), number(0), group(number(2), number(2)), group(number(2), number(1)))
PAIRS = b"](" + text("w") + tensor(stored()) + b"ea"
PAIRS += b"](" + text("b") + tensor(stored(), 4, [2], [1]) + b"ea"


@pytest.mark.parametrize(
    "body",
    [
        state_of(stored()),
        state_of(stored(), w=OLD),
        state_of(stored(), w=PARAMETER + group(OLD) + b"\x81" + group(b"\x88\x89N") + b"b"),
        state_of(stored(), w=PARAMETER + b")\x81" + group(OLD, b"NN\x88N") + b"b"),
        state_of(stored(), w=name("torch.FloatTensor") + b")R" + SET + b"b"),
        dictionary(
            text("w"),
            tensor(stored(cut=group(text("9"), number(0), number(4)))),
            text("b"),
            tensor(stored(cut=group(text("8"), number(4), number(2))), 0, [2], [1]),
        ),
        name("collections.OrderedDict") + b"]" + PAIRS + b"\x85R",
    ],
    ids=["tensor_v2", "tensor", "parameter", "empty parameter", "set_", "cut", "python 2"],
)
def test_files_of_years_ago(body: bytes, tmp_path: Path) -> None:
    """The oldest of torchvision's files are of such kinds, and torch still loads them."""
    path = row(tmp_path / "a.pth", body)
    assert_wanted(torch.load(path, weights_only=True))
    assert_wanted(loaded(path))


# Hostile pickles

SELF = b"".join(b"q\0h\0\x86" for _ in range(60))  # a tuple that holds itself twice, 60 deep
ORDERED = name("collections.OrderedDict") + b")R"
NEGATED = dictionary(text("neg"), b"\x88")
HUGE = tensor(record(), 0, [2**40], [0])
HOSTILE = {
    "deep key": b"})" + b"\x85" * 200_000 + b"Ns",
    "doubled key": b"})" + SELF + b"Ns",
    "doubled key of a storage": b")" + SELF + b"q\1" + record().replace(text("0"), b"h\1"),
    "keys of one hash": dictionary(*(number(i * (2**61 - 1)) + b"N" for i in range(20_000))),
    "many arguments": name("torch.Size") + group(*[b"N"] * 9) + b"R",
    "many dimensions": state_of(record(), tensor(record(), 0, [1] * 65, [1] * 65)),
    "shadowed method": ORDERED + dictionary(text("get"), b"N") + b"b",
    "shadowed method of a tensor": tensor(record()) + dictionary(text("dim"), b"N") + b"b",
    "tensor with attributes": state_of(record(), name("torch._tensor._rebuild_from_type_v2")),
    "meta tensor": state_of(record(), name("torch._utils._rebuild_meta_tensor_no_storage")),
    "nested tensor": state_of(record(), name("torch._utils._rebuild_nested_tensor")),
    "code": name("os.system") + group(text("true")) + b"R",
    "code, computed": b"\x8c\x02os\x8c\x06system\x93" + group(text("true")) + b"R",
    "code, INST": b"(Vtrue\nios\nsystem\n",
    "code, OBJ": b"(" + name("os.system") + text("true") + b"o",
    "code, EXT": b"\x82\x01)R",
    "call of a string": text("os.system") + group(text("true")) + b"R",
    "call of a dtype": name("torch.float32") + b")R",
    "calls of calls": name("collections.OrderedDict") + b")R" * 100,
    "arguments without end": name("torch._utils._rebuild_parameter") + HUGE + b"R",
    "items of a tuple": name("collections.OrderedDict") + b"((NNtt\x85R",
    "items without end": name("collections.OrderedDict") + HUGE + b"\x85R",
    "state without end": tensor(record()) + HUGE + b"b",
    "dictionary in itself": b"}q\0" + text("state_dict") + b"h\0s",
    "frame": b"\x95" + b"\xff" * 7 + b"\x7f",
    "buffer": b"\x97",
    "long text": b"\x8d" + b"\xff" * 7 + b"\x7f",
    "long number": b"\x8b\xff\xff\xff\x7f",
    "digits": b"L" + b"9" * 100_000 + b"L\n",
    "name twice": dictionary(text("w"), b"N", text("w"), tensor(record())),
    "name of megabytes": dictionary(text("w" * 10**7), tensor(record())),
    "negative stride": state_of(record(), tensor(record(), 1, (2, 2), (2, -1))),
    "negative size": state_of(record(), tensor(record(), 0, (-2, -2))),
    "negative offset": state_of(record(), tensor(record(), -1)),
    "beyond the storage": state_of(record(), tensor(record(), 3)),
    "beyond all numbers": state_of(record(), tensor(record(), 2**63 - 1)),
    "more values than numbers": state_of(record(), tensor(record(), 0, (2**40, 2**40), (0, 0))),
    "two dtypes": beside(record().replace(name("torch.FloatStorage"), name("torch.IntStorage"))),
    "storage without values": state_of(record().replace(text("cpu"), text("meta"))),
    "filled by halves": beside(name("torch.FloatTensor") + b")R" + group(
        record(), number(0), group(number(2), number(2))
    ) + b"b"),
    "calls of calls for attributes": name("torch._tensor._rebuild_from_type_v2") + group(
        name("torch._tensor._rebuild_from_type_v2"), b"N", b")", b"N"
    ) + b"R",
    "negated": state_of(record(), tensor(record(), 0, (2, 2), (2, 1), b"\x89N", NEGATED)),
    "storage smaller than said": state_of(record(numel=7)),
    "storage without end": state_of(record(numel=2**70)),
    "storage of less than nothing": state_of(record(numel=-6)),
    "storage elsewhere": state_of(record("../data.pkl")),
    "storage of code": group(text("module"), *[text("x")] * 4) + b"Q",
    "tensor for a storage": HUGE + b"Q",
    "two values in a byte": state_of(
        record(),
        tensor(
            record(), 0, (2, 2), (2, 1), b"\x89N", name("torch.float4_e2m1fn_x2"),
            function="torch._utils._rebuild_tensor_v3",
        ),
    ),
    "nothing": b"",
    "two things": b"NN",
    "no mark": b"t",
    "no memo": b"h\7",
    "half an item": b"}(" + text("w") + b"u",
}  # fmt: skip


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_pickle_in_an_archive(body: bytes, tmp_path: Path) -> None:
    refused(archive(tmp_path / "a.pth", body))


@pytest.mark.parametrize("key", ["doubled key", "shadowed method", "code", "frame"])
def test_a_hostile_pickle_in_a_row(key: str, tmp_path: Path) -> None:
    refused(row(tmp_path / "a.pth", HOSTILE[key]))
    refused(row(tmp_path / "a.pth", state_of(stored()), keys=HOSTILE[key]))


def test_a_storage_in_a_row_has_one_dtype(tmp_path: Path) -> None:
    again = stored(kind="torch.IntStorage")
    for other in (stored(), again):
        body = dictionary(text("state_dict"), state_of(stored()), text("other"), other)
        path = row(tmp_path / "a.pth", body)
        if other is not again:
            assert_wanted(loaded(path))
    refused(path)


def test_a_list_becomes_a_dictionary_once(tmp_path: Path) -> None:
    """Else a long one would, by a short word for it, a hundred thousand times."""
    ordered = name("collections.OrderedDict")
    pair = b"](" + text("w") + b"Ne"
    body = group(ordered + b"]q\0" + pair + b"a\x85R", ordered + b"h\0\x85R")
    assert checkpoint.read(archive(tmp_path / "a.pth", body)) == ({"w": None}, {})


def test_opcodes_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though every loss of a training is one, and there may be a million."""
    path = archive(tmp_path / "a.pth", state_of(record()))
    assert pickled.MAX_OPCODES > 1_100_000
    monkeypatch.setattr(pickled, "MAX_OPCODES", 20)
    assert "opcodes" in refused(path)


# Hostile archives


def test_an_archive_by_hand_loads(tmp_path: Path) -> None:
    """Or the tests below would show nothing."""
    path = archive(tmp_path / "a.pth", state_of(record()))
    assert_wanted(torch.load(path, weights_only=True))
    assert_wanted(loaded(path))


def with_twin(path: Path, twin: str) -> None:
    with warnings.catch_warnings(action="ignore"), ZipFile(path, "a") as file:
        file.writestr(twin, VALUES[::-1])


def promising(path: Path, wide: bool) -> None:
    """A directory of more bytes than there are, by the 32 or the 64 bits for it."""
    whole, end = path.read_bytes()[:-22], path.read_bytes()[-22:]
    if wide:
        whole += struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, 2**62, 0)
        whole += struct.pack("<4sIQI", b"PK\6\7", 0, 0, 1)
    else:
        end = end[:12] + b"\xff" * 4 + end[16:]
    path.write_bytes(whole + end)


def overlapping(path: Path) -> None:
    """Each record is as small as the file, all of them together are not."""
    names = [b"a/data.pkl", *(b"a/data/%d" % i for i in range(50))]
    data = bytes(100_000)
    sizes = (zlib.crc32(data), len(data), len(data))
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, 10, 0) + names[0]
    entries = b"".join(
        struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, *[0] * 4, *sizes, len(each), *[0] * 6) + each
        for each in names
    )
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 51, 51, len(entries), len(local + data), 0)
    path.write_bytes(local + data + entries + end)


def bomb(path: Path, size: int) -> None:
    content = {"data/0": bytes(size)} if size else {}
    archive(path, state_of(record()), ZIP_DEFLATED, **content)
    assert path.stat().st_size < 100_000


ARCHIVES: dict[str, Callable[[Path], object]] = {
    "a bomb": lambda path: bomb(path, 50_000_000),
    "compressed": lambda path: bomb(path, 0),
    "twin": lambda path: with_twin(path, "a/data/0"),
    "twin elsewhere": lambda path: with_twin(path, "other/data/0"),
    "twin by a zero": lambda path: with_twin(path, "a/data/0\0.txt"),
    "overlapping": overlapping,
    "promising": lambda path: promising(path, wide=False),
    "promising, wide": lambda path: promising(path, wide=True),
    "bytes after its end": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "a comment": lambda path: path.write_bytes(path.read_bytes()[:-2] + b"\5\0hello"),
    "of another machine": lambda path: archive(path, state_of(record()), byteorder=b"big"),
}


@pytest.mark.parametrize("damage", ARCHIVES.values(), ids=ARCHIVES)
def test_a_hostile_archive(damage: Callable[[Path], object], tmp_path: Path) -> None:
    damage(archive(tmp_path / "a.pth", state_of(record())))
    refused(tmp_path / "a.pth")


def test_a_program_is_named(tmp_path: Path) -> None:
    """torch.jit.save writes such an archive; making one here would cost seconds."""
    program = {"constants.pkl": b"\x80\x02).", "code/__torch__.py": b"op_version_set = 1\n"}
    path = archive(tmp_path / "a.pt", state_of(record()), ZIP_DEFLATED, **program)
    assert "TorchScript" in refused(path)


# Damage


@pytest.mark.parametrize(
    "damage",
    [
        {"raw": struct.pack("<q", 6) + VALUES[:-1]},
        {"raw": struct.pack("<q", 6) + VALUES + b"x"},
        {"raw": struct.pack("<q", 7) + VALUES},
        {"keys": b"]"},
        {"keys": b"](" + text("0") * 2 + b"e"},
        {"keys": b"](" + text("1") + b"e"},
        {"keys": number(0)},
        {"body": state_of(stored(numel=2**40))},
        {"body": state_of(stored(cut=group(text("9"), number(-6), number(2**40))))},
        {"little": b"\x89"},
    ],
)
def test_storages_in_a_row_must_fit(damage: dict[str, bytes], tmp_path: Path) -> None:
    assert_wanted(loaded(row(tmp_path / "a.pth", state_of(stored()))))
    refused(row(tmp_path / "a.pth", **{"body": state_of(stored())} | damage))


def flipped(whole: bytes, bits: Iterable[int]) -> Iterator[bytes]:
    for bit in bits:
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        yield bytes(content)


def outcomes(path: Path, contents: Iterable[bytes]) -> set[str]:
    """Each content is refused, or loads the very same values."""
    seen = set()
    for content in contents:
        path.write_bytes(content)
        try:
            state = loaded(path)
        except WeightsError:
            seen.add("refused")
        else:
            assert_wanted(state)
            seen.add("same")
    return seen


def test_a_flipped_bit_in_an_archive_loads_no_other_values(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(OrderedDict(WANTED), path)
    whole = path.read_bytes()
    chosen = random.Random(0).sample(range(8 * len(whole)), 250)
    assert outcomes(path, flipped(whole, chosen)) == {"refused", "same"}
    start = 8 * whole.index(b"\x80\x02")
    inside = random.Random(1).sample(range(start, start + 8 * 200), 50)
    assert outcomes(path, flipped(whole, inside)) == {"refused"}
    values = 8 * whole.index(WANTED["w"].numpy().tobytes())
    assert outcomes(path, flipped(whole, range(values, values + 128, 5))) == {"refused"}


def test_a_flipped_bit_in_a_header_of_safetensors_loads_no_other_values(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(WANTED, path, metadata={"format": "pt"})
    whole = path.read_bytes()
    header = range(64, 8 * (8 + int.from_bytes(whole[:8], "little")))
    assert outcomes(path, flipped(whole, range(64))) == {"refused"}
    bits = random.Random(0).sample(header, 250)
    assert outcomes(path, flipped(whole, bits)) == {"refused", "same"}


# Hostile state dicts


def test_attributes_do_not_reach_the_door() -> None:
    state = OrderedDict({name: tensor.clone() for name, tensor in WANTED.items()})
    for method in ("get", "items", "keys"):
        setattr(state, method, None)
    for method in ("dim", "to", "detach", "is_floating_point"):
        setattr(state["w"], method, None)
    assert_wanted(loaded(state))


@pytest.mark.filterwarnings("ignore:.*nested tensors.*")
def test_tensors_without_values() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(2)])
    assert "nested" in refused(WANTED | {"w": nested})
    bits = torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    for each in (torch.nn.UninitializedParameter(), torch.ones(2, 2, device="meta"), bits):
        refused(WANTED | {"w": each})


def test_a_key_that_cannot_be_shown() -> None:
    refused({10**5000: torch.ones(2)})
