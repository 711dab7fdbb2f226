"""The engine against torch in float64, its promises about bits, and its refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alexnet_triton import Engine, EngineError, ImageError, NetworkError, Prediction
from alexnet_triton.engine import foretell, reference
from alexnet_triton.engine.bind import allocate, bind, pack
from alexnet_triton.engine.devices.graph import Recording, waiting
from alexnet_triton.engine.devices.graph import record as record_graph
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.devices.single import Single
from alexnet_triton.engine.plan import ARITHMETIC, Options, plan
from alexnet_triton.engine.spec import Conv2d, Network, ReLU
from alexnet_triton.engine.zoo import ALEXNET, DIGITS
from alexnet_triton.kernels.jit import ALONE, architecture
from alexnet_triton.weights import load
from alexnet_triton.weights.digits import heldout
from torch.utils._python_dispatch import TorchDispatchMode

Check = Callable[..., None]


def state_of(network: Network, source: str = "random:7") -> dict[str, torch.Tensor]:
    return load(source, network.parameter_shapes(), network=network.name)


def float64(network: Network, state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The network's last output in float64, on the same weights."""
    wide = {name: tensor.double() for name, tensor in state.items()}
    x = reference.normalise(images.cpu(), network.preprocess, torch.float64)
    return list(reference.forward(network, wide, x).values())[-1]


def relative(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual.double().cpu() - wanted).abs().max() / wanted.abs().max()).item()


@pytest.fixture(scope="module")
def alexnet(device: torch.device) -> tuple[Engine, dict[str, torch.Tensor]]:
    state = state_of(ALEXNET)
    return Engine.load("alexnet", state, device=device, dtype="fp32"), state


@pytest.fixture(scope="module")
def digits(device: torch.device) -> Engine:
    return Engine.load("digits", device=device, dtype="fp32", max_batch=16)


def pixels(generator: torch.Generator, n: int, height: int, width: int) -> torch.Tensor:
    shape = (n, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


# --- full-size AlexNet -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "height", "width"),
    [(0, 224, 224), (1, 224, 224), (3, 63, 63), (1, 127, 191)],
)
def test_alexnet_is_torch_in_float64(
    alexnet: tuple[Engine, dict[str, torch.Tensor]],
    generator: torch.Generator,
    n: int,
    height: int,
    width: int,
) -> None:
    engine, state = alexnet
    images = torch.randn(n, 3, height, width, generator=generator)
    logits = engine(images)
    wanted = float64(ALEXNET, state, images)
    assert logits.shape == wanted.shape == (n, 1000)
    assert logits.dtype == torch.float32
    if n:
        assert relative(logits, wanted) < 1e-4
    if n > 1:
        images[-1] = images[0]
        again = engine(images)
        assert torch.equal(again[:-1], logits[:-1]), "another run"
        assert torch.equal(again[-1], again[0]), "the same image at another position"


# --- the small network: everything else --------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny2012: Network, device: torch.device) -> Engine:
    return Engine.load(tiny2012, "random:7", device=device, dtype="fp32", max_batch=4)


def test_uint8_nhwc_arrays_and_lists_mean_the_same(
    tiny: Engine, tiny2012: Network, generator: torch.Generator
) -> None:
    images = pixels(generator, 3, 15, 15)
    wanted = tiny(images)
    nhwc = images.permute(0, 2, 3, 1)
    assert torch.equal(tiny(nhwc.contiguous()), wanted)
    assert torch.equal(tiny(nhwc.contiguous().numpy()), wanted)
    assert torch.equal(tiny(list(images)), wanted)
    strided = images.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, ::2, ::2]
    assert torch.equal(tiny(strided), wanted)
    floats = reference.normalise(images, tiny2012.preprocess, torch.float32)
    assert relative(tiny(floats), wanted.double().cpu()) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "bound"), [("bf16", 5e-2), ("tf32", 2e-2), ("fp16", 1e-2), ("fp32", 1e-4)]
)
@pytest.mark.parametrize("n", [1, 8, 64, 130, 256, 1024])
def test_alexnet_on_a_gpu(n: int, dtype: str, bound: float, generator: torch.Generator) -> None:
    """At once and in pieces, twice over, with torch's own answer in float64 from the same GPU."""
    state = state_of(ALEXNET)
    images = pixels(generator, n, 224, 224)
    wide = {name: tensor.double().cuda() for name, tensor in state.items()}
    x = reference.normalise(images.cuda(), ALEXNET.preprocess, torch.float64)
    wanted = list(reference.forward(ALEXNET, wide, x).values())[-1].cpu()
    for max_batch in (256, 1024):
        engine = Engine.load("alexnet", state, device="cuda", dtype=dtype, max_batch=max_batch)
        logits = engine(images)
        assert relative(logits, wanted) < bound
        assert torch.equal(engine(images), logits)


@pytest.mark.interpreter
@pytest.mark.parametrize("copied", [True, False])
def test_a_recording_is_made_alone_on_a_stream_of_its_device(
    copied: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """torch's own stream for recordings may be another GPU's: what is launched would not be there.

    Without a GPU, torch's side of it stands in. Images that are not copied are read by a pass that
    is no part of the graph.
    """
    seen: list[object] = []

    class Graph:
        def replay(self) -> None:
            seen.append("replay")
            recording._launch()

    def alone() -> bool:  # whether nobody else could hold the lock now
        with ThreadPoolExecutor(1) as other:
            if free := other.submit(ALONE.acquire, blocking=False).result():
                other.submit(ALONE.release).result()
        return not free

    @contextmanager
    def record(graph: Graph, stream: object = None, capture_error_mode: str = "") -> Iterator[None]:
        seen.append((stream, capture_error_mode, alone()))
        yield

    def device(index: torch.device) -> AbstractContextManager[None]:
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append(alone()))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    monkeypatch.setattr(torch.cuda, "graph", record)
    state = state_of(DIGITS, "digits")
    planned = plan(DIGITS, 1, ARITHMETIC["fp32"], None)
    bound = bind(planned, pack(DIGITS, state, planned.arithmetic, "cpu"))
    images = pixels(generator, 1, 64, 64)
    recording = Recording(bound, torch.empty_like(images) if copied else None)
    replay = record_graph(recording._launch, images.device)
    assert seen == [True, ("a stream of cpu", "thread_local", True)]
    recording._replay = replay  # as on a GPU
    recording.run(images)
    recording.run(images)
    assert seen[2:] == ["replay", "replay"]
    logits = bound.outputs["fc8"][0, 0]
    assert relative(logits, float64(DIGITS, state, images)) < 1e-4


@pytest.mark.gpu
def test_two_engines_record_at_the_same_time(generator: torch.Generator) -> None:
    """Each from its own thread, shape after shape: neither spoils the other's recording."""
    engines = [Engine.load("digits", device="cuda") for _ in range(2)]
    images = pixels(generator, 24, 64, 64).cuda()
    wanted = [engines[0](images[:n]) for n in range(1, 25)]
    with ThreadPoolExecutor(2) as pool:
        found = [*pool.map(lambda one: [one(images[:n]) for n in range(1, 25)], engines)]
    for outputs in found:
        assert all(torch.equal(made, one) for made, one in zip(outputs, wanted, strict=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("until", ["conv1", "pool1", "pool2", "fc6"])
def test_slices_give_the_same_answer(until: str, generator: torch.Generator) -> None:
    """Slices of 3, 3 and 1 images; memory poisoned first."""
    state = state_of(DIGITS, "digits")
    arithmetic = ARITHMETIC["fp32"]
    planned = plan(DIGITS, 7, arithmetic, None, options=Options(3, until))
    assert planned.sliced
    packed = pack(DIGITS, state, arithmetic, "cpu")
    memory = allocate(planned, torch.device("cpu")).fill_(255)  # NaN, read as float32
    bound = bind(planned, packed, memory=memory)
    images = pixels(generator, 7, 64, 64)
    bound.run(images)
    logits = bound.outputs["fc8"][0, 0]
    assert relative(logits, float64(DIGITS, state, images)) < 1e-5


@pytest.mark.gpu
def test_a_recorded_run_reads_each_batch_anew(generator: torch.Generator) -> None:
    """The graph's own memory for images is filled again, and a smaller shape leaves it valid."""
    engine = Engine.load("digits", device="cuda")
    first, second = pixels(generator, 8, 64, 64), pixels(generator, 8, 64, 64)
    one, other = engine(first), engine(second)
    assert not torch.equal(one, other)
    engine(first[:3])
    engine(first.permute(0, 2, 3, 1).contiguous())
    assert torch.equal(engine(first.cuda()), one)
    assert torch.equal(engine(second), other)


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
def test_options_change_nothing_but_time(pdl: bool, generator: torch.Generator) -> None:
    """Slices and overlapping launches, recorded, many times over: a race would show."""
    state = state_of(ALEXNET, "random:5")
    device = torch.device("cuda")
    arch = architecture(device)
    if pdl and (arch or 0) < 90:
        pytest.skip("programmatic dependent launch wants compute capability 9.0")
    images = pixels(generator, 130, 224, 224).to(device)
    planner = Planner(ALEXNET, ARITHMETIC["fp16"], arch)
    runner = Single(replace(planner, options=Options(64, "pool2", pdl)), state, device)
    plain = Single(planner, state, device)
    wanted = plain.run(images, ("fc8",), 130)["fc8"]
    made = runner.run(images, ("fc8",), 130)["fc8"].clone()
    assert relative(made, wanted.double().cpu()) < 5e-3
    for _ in range(50):
        assert torch.equal(runner.run(images, ("fc8",), 130)["fc8"], made)
    few = runner.run(images[:2], ("fc8",), 2)["fc8"].clone()
    for _ in range(200):
        assert torch.equal(runner.run(images[:2], ("fc8",), 2)["fc8"], few)


class Operations(TorchDispatchMode):
    """What torch is asked to do, in order, but for views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it torch would import it, for seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view:
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine that runs as on a card, but the n-th launch of its graph makes every logit n."""
    turns = count(1)

    def replay(recording: Recording) -> None:
        recording.bound.outputs["fc8"].fill_(next(turns))

    monkeypatch.setattr(Recording, "_launch", replay)
    monkeypatch.setattr(foretell, "say", lambda *words: None)
    return Engine.load("digits", device="cpu", target="sm_90", max_batch=2)


@pytest.mark.interpreter
@pytest.mark.parametrize("images", [1, 2, 5])
def test_a_hot_call_copies_once_in_and_once_out(images: int, recorded: Engine) -> None:
    """Every operation of torch costs the host as much as the launch of the whole graph."""
    batch = torch.zeros(images, 3, 64, 64, dtype=torch.float16)
    pieces = -(-images // 2)
    launched = ["copy_", "fill_", "copy_"] * pieces
    recorded(batch)
    out = torch.empty(images, 10)
    with Operations() as asked:
        first = recorded(batch)
    assert asked.seen == ["empty", *launched]
    with Operations() as asked:
        assert recorded(batch, out=out) is out
    assert asked.seen == launched
    for result, calls in ((first, 1), (out, 2)):  # the caller's: no later call writes there
        wanted = calls * pieces + torch.arange(images) // 2 + 1
        assert torch.equal(result, wanted[:, None].expand(images, 10).float())


@pytest.mark.interpreter
def test_a_run_starts_after_the_last_and_ends_when_its_outputs_are_copied(
    recorded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On whatever stream: they share memory. Without a GPU, torch's side of it stands in."""
    told: list[object] = []
    out = torch.zeros(1, 10)

    class Event:
        def record(self, stream: str) -> None:
            assert recorded._turn.locked()
            told.append(("recorded on", stream, out[0, 0].item()))

    class Stream(str):
        def wait_event(self, event: Event) -> None:
            told.append(("waits on", self, event is done, out[0, 0].item()))

    done, streams = Event(), iter("abc")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(next(streams)))
    recorded._done = {torch.device("cpu"): done}  # type: ignore[dict-item]
    for _ in range(2):
        recorded(torch.zeros(1, 3, 64, 64), out=out)
    assert told == [
        ("waits on", "a", True, 0),
        ("recorded on", "a", 1),
        ("waits on", "b", True, 1),
        ("recorded on", "b", 2),
    ]

    def broken(recording: Recording, images: torch.Tensor) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Recording, "run", broken)
    with pytest.raises(KeyboardInterrupt):
        recorded(torch.zeros(1, 3, 64, 64), out=out)
    assert told[4:] == [("waits on", "c", True, 2), ("recorded on", "c", 2)], "what it had queued"


def test_few_images_are_copied_and_many_are_read_where_they_lie() -> None:
    whole = plan(ALEXNET, 64, ARITHMETIC["fp16"], 90)
    assert waiting(whole, 8 * 2**20) == 8 * 2**20
    assert waiting(whole, 8 * 2**20 + 1) == 0
    cut = plan(ALEXNET, 64, ARITHMETIC["fp16"], 90, options=Options(32, "pool1"))
    assert waiting(cut, 2**30) == 2**30, "every slice has a pass, so all are in the graph"


@pytest.mark.interpreter
def test_crops_of_channels_last_images_wait_as_dense_ones(generator: torch.Generator) -> None:
    """Rows of a crop may be aligned where those of its dense copy, which a graph reads, are not."""
    conv = replace(DIGITS, layers=(("conv1", Conv2d(8, 3, padding=1)), ("relu1", ReLU())))
    state = state_of(conv)
    engine = Engine.load(conv, state, device="cpu", target="sm_90")
    whole = torch.full((2, 12, 16, 3), torch.nan, dtype=torch.float16).permute(0, 3, 1, 2)
    crop = whole[..., 1:10, :9].copy_(torch.randn(2, 3, 9, 9, generator=generator))
    wanted = float64(conv, state, crop)
    assert relative(engine(crop), wanted) < 1e-2
    assert relative(engine(crop[:1].expand(2, -1, -1, -1)), wanted[:1].expand(2, -1, -1, -1)) < 1e-2


def test_memory_is_told(digits: Engine) -> None:
    told = digits.memory
    assert told.weights == 4 * 899_378
    assert told.workspace == digits.plan.workspace > 0
    assert told.total == told.weights + told.workspace + told.images
    assert str(told).startswith(f"{told.total / 1e6:.1f} MB: weights 3.6")


@pytest.mark.bits
def test_a_long_batch_is_cut_and_every_position_gets_the_same_bits(
    tiny: Engine, generator: torch.Generator
) -> None:
    image = pixels(generator, 1, 15, 15)
    logits = tiny(image.repeat(11, 1, 1, 1))  # pieces of 4, 4 and 3
    assert logits.shape == (11, 40)
    assert (logits == logits[0]).all()


def test_batch_invariance_over_pieces(device: torch.device, generator: torch.Generator) -> None:
    images = pixels(generator, 3, 64, 64)
    engines = [
        Engine.load("digits", device=device, dtype="fp32", max_batch=n, batch_invariant=True)
        for n in (2, 16)
    ]
    together = engines[1](images)
    assert torch.equal(engines[0](images), together)
    alone = torch.cat([engines[1](image[None]) for image in images])
    assert torch.equal(alone, together)


def test_out_is_filled_and_refused_by_shape(digits: Engine, device: torch.device) -> None:
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    out = torch.full((2, 10), float("nan"), device=device)
    assert digits(images, out=out) is out
    assert out.isfinite().all()
    with pytest.raises(
        EngineError, match=r"out: wanted float32 \[2, 10\] .* got float32 \[3, 10\]"
    ):
        digits(images, out=torch.empty(3, 10, device=device))


def test_features_are_torchs_layer_by_layer(
    digits: Engine, generator: torch.Generator, assert_close: Check
) -> None:
    images = pixels(generator, 18, 64, 64)  # more than max_batch
    names = ("conv1", "pool1", "conv3", "conv5", "fc6", "fc7", "fc8")
    found = digits.features(images, names)
    assert tuple(found) == names
    wide = {name: t.double() for name, t in state_of(DIGITS, "digits").items()}
    x = reference.normalise(images, DIGITS.preprocess, torch.float64)
    wanted = reference.forward(DIGITS, wide, x)
    for name in names:
        relu = name.replace("conv", "relu").replace("fc", "relu")
        after = wanted.get(relu, wanted[name]) if name != "fc8" else wanted[name]
        assert found[name].dtype == torch.float32
        assert found[name].shape == after.shape
        assert relative(found[name], after) < 1e-5, name
    assert torch.equal(found["fc8"], digits(images))
    with pytest.raises(NetworkError, match=r"digits has no features 'conv6'; it has conv1, pool1"):
        digits.features(images, ["conv6"])
    assert digits.features(images[:0], ["conv2"])["conv2"].shape == (0, 24, 7, 7)


def test_torch_backend_is_the_same_network(
    digits: Engine, device: torch.device, generator: torch.Generator
) -> None:
    images = pixels(generator, 5, 64, 64)
    engine = Engine.load("digits", device=device, dtype="fp32", backend="torch")
    assert relative(engine(images), digits(images).double().cpu()) < 1e-4
    ours, theirs = digits.features(images), engine.features(images)
    for name, feature in ours.items():
        assert relative(theirs[name], feature.double().cpu()) < 1e-4, name


def test_torchs_settings_change_nothing(device: torch.device, generator: torch.Generator) -> None:
    """Around a call, a default dtype and autocast are a script's: the engine's dtype was asked."""
    engine = Engine.load("digits", device=device, dtype="fp32", backend="torch")
    images = torch.randn(2, 3, 63, 63, generator=generator)
    wanted = engine.features(images, "fc8")["fc8"]
    torch.set_default_dtype(torch.float16)
    try:
        with torch.autocast(device.type):
            got = engine.features(images, "fc8")["fc8"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert got.equal(wanted)


def test_classify_finds_the_digits_and_a_bad_image_costs_only_itself(
    digits: Engine, tmp_path: Path
) -> None:
    files = heldout()[::40]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG but no more")
    images = [path for path, _ in files]
    results = digits.classify([*images[:2], broken, *images[2:]], top=3)
    assert isinstance(results[2], ImageError)
    assert "broken.png" in str(results[2])
    for (_, label), predictions in zip(files, results[:2] + results[3:], strict=True):
        assert isinstance(predictions, list)
        assert predictions[0].index == label
        assert predictions[0].label == str(label)
        assert [type(p) for p in predictions] == [Prediction] * 3
        scores = [p.score for p in predictions]
        assert scores == sorted(scores, reverse=True)
        assert 0 < sum(scores) <= 1 + 1e-5
    with pytest.raises(ImageError, match=r"broken\.png"):
        digits(broken)


def test_stream_is_lazy_and_in_order(digits: Engine) -> None:
    files = heldout()[::20]
    taken = []

    def source() -> Iterator[Path]:
        for path, _ in files:
            taken.append(path)
            yield path

    stream = digits.stream(source(), batch_size=4, top=1)
    first = next(stream)
    assert len(taken) <= 8  # one batch computed, one on its way
    results = [first, *stream]
    found = [r[0].index for r in results if not isinstance(r, ImageError)]
    assert found == [label for _, label in files]
    assert list(digits.stream([])) == []
    assert digits.classify(files[0][0])[0][0].index == files[0][1]  # type: ignore[index]


def test_one_engine_from_many_threads(tiny: Engine, generator: torch.Generator) -> None:
    batches = [pixels(generator, n, 15, 15) for n in (1, 3, 4, 6)]
    wanted = [tiny(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(tiny, batches * 2)]
    assert all(torch.equal(made, one) for made, one in zip(found, wanted * 2, strict=True))


def test_images_that_do_not_fit_are_refused_by_layer(digits: Engine) -> None:
    with pytest.raises(NetworkError, match=r"digits, layer pool5: input .* 63x63"):
        digits(torch.zeros(1, 3, 40, 40, dtype=torch.uint8))
    least = torch.zeros(1, 3, 63, 63, dtype=torch.uint8)
    assert digits(least).shape == (1, 10)
    for height, width in ((62, 63), (63, 62)):
        with pytest.raises(NetworkError, match="63x63"):
            digits(least[:, :, :height, :width])
    with pytest.raises(ImageError, match=r"wanted uint8 pixels or normalised floats .* got int64"):
        digits(np.zeros((1, 3, 64, 64), dtype=np.int64))
