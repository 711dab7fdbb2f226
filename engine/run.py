"""The engine: packed weights bound to plans, run in batches.

    engine = Engine.load("alexnet")
    logits = engine(images)

Loading checks everything once; running checks nothing but the images. A batch longer than
`max_batch` is cut into pieces that all compute with the same configurations, so an image's logits
do not depend on its place.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..weights import Source
from . import foretell
from .devices.graph import waiting
from .devices.pipeline import Pipeline
from .devices.planner import Planner
from .devices.single import Single
from .devices.torch import Torch
from .devices.towers import Towers
from .images import ImageError, Views, load_each, one_behind, to_batch
from .load import (
    Backend,
    Classes,
    EngineError,
    Split,
    aim,
    arithmetic,
    at_least_one,
    find,
    load_state,
    named,
    of_kind,
    one_of,
    places,
    read_classes,
)
from .names import canonical
from .plan import PLAIN, Options, Plan
from .profile import Profile, profile
from .spec import Conv2d, Linear, Network, Preprocess, Shape, Sigmoid, Softmax
from .summary import Summary, summarise

Runner = Single | Torch | Pipeline | Towers
Best = tuple[torch.Tensor, torch.Tensor, torch.cuda.Event | None]  # scores, classes, on the host

DEFAULT_MICRO_BATCH = 64


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a device that an engine takes for a full batch."""

    weights: int
    workspace: int  # activations and split sums, shared by all sizes of batches
    images: int  # where a batch waits, on a GPU, unless it is large and read where it lies

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.workspace + self.images

    def __str__(self) -> str:
        return (
            f"{self.total / 1e6:.1f} MB: weights {self.weights / 1e6:.1f}, activations "
            f"{self.workspace / 1e6:.1f}, images {self.images / 1e6:.1f}"
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class of one image; `score` is its softmax probability."""

    index: int
    label: str
    score: float


class Engine:
    """Runs one network on one device or two. Make one with `Engine.load`.

    Safe to call from many threads: calls take turns. It belongs to the process that loaded it.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        dtype: str,
        backend: Backend = "triton",
        max_batch: int = 256,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        self.network = runner.planner.network
        self.device = runner.devices[-1]
        self.dtype = dtype
        self.backend = backend
        self.max_batch = max_batch
        self.class_names = class_names or named(self.network, None)
        self._runner = runner
        self._process = os.getpid()
        # What a call needs is kept: planning or walking the network costs more than launching it.
        self._last, self._output = runner.planner(1).steps[-1].name, self.network.output_shape()
        self._output_shape = lru_cache(maxsize=64)(partial(_output_shape, runner.planner))
        self._interprets_a_card = runner.planner.arch is not None and self.device.type == "cpu"
        first = runner.devices[0]
        self._copies = torch.cuda.Stream(first) if first.type == "cuda" else None
        self._turn = threading.Lock()
        # Of the last run, on each GPU; to wait for one before the first run is to wait for nothing.
        self._done = {d: torch.cuda.Event() for d in runner.devices if d.type == "cuda"}
        self._foretold: set[object] = set()  # shapes of batches whose time was told

    @classmethod
    def load(
        cls,
        network: str | Path | Network | torch.nn.Module = "alexnet",
        weights: Source | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        backend: Backend = "triton",
        max_batch: int = 256,
        batch_invariant: bool = False,
        *,
        classes: Classes | None = None,
        input_shape: tuple[int, int, int] | None = None,
        preprocess: Preprocess | None = None,
        devices: tuple[str | torch.device, str | torch.device] | None = None,
        split: Split | None = None,
        at: str = "auto",
        micro_batch: int | None = None,
        target: str | None = None,
        options: Options | None = None,
    ) -> Engine:
        """Load a network with its weights onto a device, or onto two.

        network: a name in the zoo, a `Network`, or, with its weights, an .onnx file or an
        nn.Module that is a chain of what `Network` has, in eval mode: its weights are copied.
        weights: "imagenet", "digits", "random:SEED", a file (.pth, .safetensors, .keras,
        .weights.h5), a state dict, or torchvision's enum; None is the network's published state.
        The last layer's weights tell how many classes there are. device: None is the GPU if there
        is one, else the CPU, where the kernels run in Triton's interpreter. dtype: "fp32", "tf32",
        "fp16", "bf16", or torch's; None is fp16 on a GPU and fp32 on a CPU. backend: "triton", or
        "torch" for the same network by cuDNN or oneDNN. max_batch: images of one piece; longer
        batches are cut. batch_invariant: the same bits at every batch size, at some cost in speed.
        classes: the classes' names in order, or a file of them, one a line; None is the network's
        own, or for another number of classes their numbers. input_shape: (C, H, W) of the images
        that a module is for; None is (3, 224, 224). preprocess: how pictures become them, a
        `Preprocess`; None is the network's own, for a module that the zoo does not know
        torchvision's preset at that size.

        devices: two devices instead of one, which may be the same one twice. split: "pipeline" cuts
        the plan in two at step `at` ("auto": where the slower stage is fastest) and sends
        `micro_batch` images at a time through both; "towers" gives each device half of every
        layer's filters.

        target: run on a CPU what a card would: its steps, tiles, splits, order of sums and storage
        dtypes, interpreted, slowly. "sm_90", or a card's name ("h200", "NVIDIA H200"), whose tuned
        table is then used; dtype None is fp16. Factors of tf32 are cut off as a tensor core reads
        them, dependent launch and prefetch are left out, the cut of a pipeline is predicted, and
        the bits are not the card's. On one device it says how long before a run of minutes.
        options: how launches follow one another; None is as the device's table says.

        Raises NetworkError for an unknown network or a cut there is not, WeightsError for weights
        that do not fit, and EngineError for anything else, in one line.
        """
        net, published = find(network, input_shape)
        if preprocess is not None:
            of_kind("preprocess", preprocess, Preprocess)
            net = replace(net, preprocess=preprocess)
        one_of("backend", backend, ("triton", "torch"))
        of_kind("batch_invariant", batch_invariant, bool)
        words = read_classes(classes)
        if options is not None:
            of_kind("options", options, Options)
        if split != "pipeline" and (at != "auto" or micro_batch is not None):
            raise EngineError("at, micro_batch: wanted with split='pipeline' alone")
        if net.input_shape[0] != 3:
            raise EngineError(f"{net.name}: wanted a network of RGB images, got {net.input_shape}")
        if target is not None and device is None and split is None:
            device = "cpu"
        where = places(device, devices, split, backend)
        aimed, *others = (aim(target, place, backend) for place in where)
        if any(other.arch != aimed.arch for other in others):
            raise EngineError(f"devices: wanted two of one compute capability, got {where}")
        dtype, meaning = arithmetic(dtype, where[0], backend, target)
        max_batch = at_least_one("max_batch", max_batch)
        if micro_batch is not None:
            micro_batch = at_least_one("micro_batch", micro_batch)
        if batch_invariant and backend == "torch":
            raise EngineError("batch_invariant: only the triton backend promises it, got 'torch'")
        if options is not None and backend == "torch":
            raise EngineError("options: only the triton backend has them, got 'torch'")
        if split is not None and options is not None and (options.slice_images or options.pdl):
            raise EngineError(f"options: slices and pdl are for one device, got split={split!r}")
        if backend == "triton" and where[0].type == "cpu":
            print(
                "no GPU in use: kernels run in Triton's interpreter, exact but slow "
                "(backend='torch' is the fast way on a CPU)"
                if aimed.name is None
                else f"{aimed.name}: its {'tuned' if aimed.tuned else 'untuned'} plan runs in "
                "Triton's interpreter, slowly; dependent launch and prefetch are left out, and the "
                "bits are not the card's",
                file=sys.stderr,
            )
        net, state = load_state(net, published if weights is None else weights)
        words = named(net, words)
        if split is not None and options is None:
            options = PLAIN  # stages and towers have an order of their own
        planner = Planner(net, meaning, aimed.arch, batch_invariant, aimed.tuned, options)
        planner(max_batch)  # refuses options that are none
        if backend == "triton" and where[0].type == "cuda" and not batch_invariant:
            _tell_of_defaults(planner, where[0], dtype, max_batch)
        runner: Runner
        match split, backend, where:
            case "pipeline", _, (first, second):
                size = min(micro_batch or DEFAULT_MICRO_BATCH, max_batch)
                runner = Pipeline(planner, state, (first, second), at, size)
            case "towers", _, (first, second):
                runner = Towers(planner, state, (first, second))
            case _, "torch", _:
                runner = Torch(planner, state, where[0])
            case _:
                runner = Single(planner, state, where[0])
        return cls(runner, dtype=dtype, backend=backend, max_batch=max_batch, class_names=words)

    def with_state(self, state: Mapping[str, torch.Tensor]) -> Engine:
        """An engine of one device again, with other weights by the same names and one plan."""
        planner = self._runner.planner
        _, state = load_state(planner.network, state)
        return Engine(Single(planner, state, self.device), dtype=self.dtype)

    # --- what it computes --------------------------------------------------------------------

    def __call__(self, images: Any, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits, float32 [N, classes], on the engine's device; `out` is filled if given.

        images: anything `images.to_batch` takes; float ones that are channels last in the engine's
        dtype are read without a pass over them. Raises ImageError for an image that is none.
        """
        batch = self._batch(images)
        shape = (batch.shape[0], *self._output_shape(batch.shape[1:]))
        if out is None:
            out = torch.empty(shape, dtype=torch.float32, device=self.device)
        elif not isinstance(out, torch.Tensor):
            raise EngineError(
                f"out: wanted a tensor, got {type(out).__name__}; torch.from_numpy(out) is one on "
                "the same memory"
            )
        elif out.is_nested or out.layout is not torch.strided or _overlaps(out):
            raise EngineError("out: wanted a dense tensor with memory of its own for every number")
        elif out.shape != shape or out.dtype != torch.float32 or out.device != self.device:
            raise EngineError(
                f"out: wanted float32 {list(shape)} on {self.device}, got "
                f"{str(out.dtype).removeprefix('torch.')} {list(out.shape)} on {out.device}"
            )
        self._fill({self._last: out}, batch)
        return out

    def features(
        self, images: Any, layers: str | Collection[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Activations of the named layers after their ReLU, from one pass.

        layers: None is every convolution and linear layer but the last. Convolutions and pools come
        as float32 [N, C, H, W], linear layers as [N, features]. torchvision's names will do, too,
        `features.1` for conv1 after its ReLU, and stay in the result. Raises NetworkError naming
        the layers there are, if one is not, or is one before its ReLU.
        """
        batch = self._batch(images)
        if layers is None:
            owners = [n for n, layer in self.network.layers if isinstance(layer, Conv2d | Linear)]
            layers = [name for name in owners if name != self.network.head]
        if not isinstance(layers, Collection) or not all(isinstance(n, str) for n in layers):
            raise EngineError(f"layers: wanted the names of layers, got {layers!r}")
        layers = (layers,) if isinstance(layers, str) else tuple(dict.fromkeys(layers))
        own = {name: canonical(self.network, name) for name in layers}
        keep = tuple(dict.fromkeys(own.values()))
        planned = self._runner.planner(1, tuple(batch.shape[1:]), keep=keep)  # refuses a bad fit
        shapes = {name: shape for name, _, _, shape in self.network.walk(planned.image_shape)}
        empty = partial(torch.empty, dtype=torch.float32, device=self.device)
        outs = {name: empty((len(batch), *shapes[name])) for name in keep}
        self._fill(outs, batch)
        return {name: outs[own[name]] for name in layers}

    def classify(
        self, images: Any, top: int = 5, views: Views = "center", exif: bool = False
    ) -> list[list[Prediction] | ImageError]:
        """The `top` classes of every image, best first.

        An image that cannot be read leaves its ImageError in its place; the others are unharmed.
        `views="ten-crop"` averages the probabilities of ten views of every picture, as in 2012.
        `exif` turns pictures as their EXIF says, which torchvision does not.
        """
        size = self.max_batch
        return list(self.stream(images, batch_size=size, top=top, views=views, exif=exif))

    def stream(
        self,
        source: Iterable[Any],
        batch_size: int = 256,
        top: int = 5,
        views: Views = "center",
        exif: bool = False,
    ) -> Iterator[list[Prediction] | ImageError]:
        """Classify any iterable of images, paths or batches: a result an image, in order, lazily.

        On a GPU, pixels travel from pinned memory while the batch before them is computed.
        """
        one_of("views", views, ("center", "ten-crop"))
        of_kind("exif", exif, bool)
        ends_in = self.network.layers[-1][1]
        if self._output == (1,) and not isinstance(ends_in, Sigmoid):
            raise EngineError(
                f"{self.network.name}: classify wants two classes or more, got one output; "
                "engine(images) gives it, and .sigmoid() makes a probability of a logit"
            )
        if len(self._output) != 1:
            sides = ", ".join(map(str, self._output))
            raise EngineError(
                f"{self.network.name}: classify wants a network that ends in [N, classes], got "
                f"[N, {sides}]; engine(images) gives them"
            )
        batch_size, top = at_least_one("batch_size", batch_size), at_least_one("top", top)
        loaded = load_each(source, self.network.preprocess, views, exif)
        size = min(batch_size, self.max_batch)
        for errors, best in one_behind(loaded, size, lambda pixels: self._best(pixels, top)):
            yield from self._predictions(errors, best)

    # --- what it is --------------------------------------------------------------------------

    def profile(self, images: Any, repeats: int | None = None) -> Profile:
        """Where the milliseconds of a call go: by step, by copy, and the host's; print it.

        images: as for a call, 1 to `max_batch` of them. repeats: of which the medians are taken;
        None is 20 on a GPU and 3 where kernels are interpreted. Raises EngineError for other
        numbers, and where not the kernels on one device run.
        """
        if not isinstance(self._runner, Single):
            got = "backend='torch'" if isinstance(self._runner, Torch) else "two devices"
            raise EngineError(f"profile: wanted the Triton kernels on one device, got {got}")
        batch = self._batch(images)
        if not 0 < len(batch) <= self.max_batch:
            raise EngineError(
                f"profile: wanted 1 to {self.max_batch} images (max_batch), got {len(batch)}"
            )
        if repeats is not None:
            repeats = at_least_one("repeats", repeats)
        return profile(self, self._turn, self._runner, batch, self._last, repeats)

    @property
    def plan(self) -> Plan:
        """The plan of a full batch of the network's own image size, on one device; print it."""
        return self._runner.planner(self.max_batch)

    @property
    def memory(self) -> Memory:
        """What `max_batch` images of the network's own size take on one device, uint8 pixels."""
        planned = self.plan
        shapes = self.network.parameter_shapes().values()
        parameters = sum(torch.Size(shape).numel() for shape in shapes)
        pixels = waiting(planned, planned.batch * torch.Size(planned.image_shape).numel())
        return Memory(
            weights=parameters * planned.arithmetic.dtype.itemsize,
            workspace=planned.workspace,
            images=0 if planned.arch is None else pixels,
        )

    def summary(self) -> Summary:
        """The network as a table; print it, or read its rows. With a target, its steps too."""
        return summarise(self.network, self.plan if self._interprets_a_card else None)

    def __reduce__(self) -> NoReturn:
        raise EngineError(
            "Engine: cannot be pickled or copied, its weights and launches are bound to one "
            "process; load one in each process, Engine.load(...)"
        )

    def __repr__(self) -> str:
        return f"Engine({self.network.name}, {self.dtype}, {self.backend}, {self.device})"

    # --- how ---------------------------------------------------------------------------------

    def _batch(self, images: Any) -> torch.Tensor:
        """`images` as one tensor [N, 3, H, W]. Raises EngineError in a fork, and ImageError."""
        if os.getpid() != self._process:
            raise EngineError(
                "Engine: was loaded before this process was forked, and cannot run in both; load "
                "one in each process, Engine.load(...)"
            )
        return to_batch(images, self.network.preprocess)

    def _fill(self, outs: dict[str, torch.Tensor], batch: torch.Tensor) -> None:
        """Run `batch`, in pieces if it is long, and copy the outputs of steps to `outs` [N, ...].

        A hot call costs the host one copy in, one launch of a graph and one copy for each output.
        """
        count, size, keep = batch.shape[0], self.max_batch, tuple(outs)
        configured_for = min(count, size)
        self._foretell(batch, keep, configured_for)
        for start in range(0, count, size):
            piece, into = batch, outs
            if count > size:
                rows = slice(start, start + size)
                piece, into = batch[rows], {name: out[rows] for name, out in outs.items()}
            with self._running(piece, keep, configured_for) as outputs:
                for name, out in into.items():
                    output = outputs[name]
                    if out.shape != output.shape:  # a last Flatten is no step
                        out = out.view(output.shape)
                    out.copy_(output)

    @contextmanager
    def _running(
        self, piece: torch.Tensor, keep: tuple[str, ...], configured_for: int
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Run at most `max_batch` images; inside, outputs of the steps in `keep`, where they lie.

        They are views, [N, C, H, W] or [N, features], of memory that the next run writes to.
        """
        # Waits for the copy: a caller's pinned buffer may be filled anew once we return.
        piece = piece.to(self._runner.devices[0])
        with torch.inference_mode(), self._turn:
            # All runs share memory: this one starts after the last, whatever stream that was on,
            # and ends when its outputs are copied.
            turns = [(torch.cuda.current_stream(d), e) for d, e in self._done.items()]
            for stream, done in turns:
                stream.wait_event(done)
            try:
                yield self._runner.run(piece, keep, configured_for)
            finally:  # what a run that breaks off has queued still runs
                for stream, done in turns:
                    done.record(stream)

    def _foretell(self, batch: torch.Tensor, keep: tuple[str, ...], configured_for: int) -> None:
        """How long it takes, once for each shape, where the interpreter runs a card's plan."""
        runner, shape = self._runner, (batch.shape, keep)
        told = not self._interprets_a_card or shape in self._foretold
        if told or not isinstance(runner, Single) or not len(batch):
            return
        self._foretold.add(shape)
        piece = batch[: self.max_batch]
        with self._turn, torch.inference_mode():
            ready = runner.ready(piece, keep, configured_for)
            times = len(batch) / len(piece)
            foretell.say(ready.launches.every_launch(piece), f"{len(batch)} images", times)

    def _best(self, pixels: torch.Tensor, top: int) -> Best:
        """The `top` scores and classes of every image, on their way to the host."""
        scores, classes = self._scores(pixels).topk(min(top, len(self.class_names)))
        if self.device.type == "cpu":
            return scores, classes, None
        host = scores.to("cpu", non_blocking=True), classes.to("cpu", non_blocking=True)
        return *host, torch.cuda.current_stream(self.device).record_event()

    def _scores(self, pixels: torch.Tensor) -> torch.Tensor:
        """Probabilities [N, classes] of [N, 3, H, W], or of [N, views, 3, H, W] their mean."""
        outputs = self(self._send(pixels.flatten(0, -4)))
        if outputs.shape[1:] != self._output:
            raise EngineError(
                f"{self.network.name}: images of {pixels.shape[-2]}x{pixels.shape[-1]} give "
                f"{outputs[0].numel()} outputs, its classes are {self._output[0]}; classify images "
                f"of {self.network.input_shape[1]}x{self.network.input_shape[2]}"
            )
        match self.network.layers[-1][1]:
            case Softmax():
                scores = outputs
            case Sigmoid() if outputs.shape[1] == 1:  # one output that says yes to the second class
                scores = torch.cat((1 - outputs, outputs), dim=1)
            case Sigmoid():
                scores = outputs
            case _:
                scores = outputs.softmax(1)
        return scores.reshape(len(pixels), -1, scores.shape[1]).mean(1)

    def _send(self, batch: torch.Tensor) -> torch.Tensor:
        """`batch` where images go in; from a CPU to a GPU on a stream of its own."""
        if self._copies is None or batch.is_cuda:
            return batch
        first = self._runner.devices[0]
        with torch.cuda.stream(self._copies):
            sent = batch.pin_memory().to(first, non_blocking=True)
        compute = torch.cuda.current_stream(first)
        compute.wait_stream(self._copies)
        sent.record_stream(compute)
        return sent

    def _predictions(
        self, errors: list[ImageError | None], best: Best | None
    ) -> Iterator[list[Prediction] | ImageError]:
        answers: Iterator[tuple[list[int], list[float]]] = iter(())
        if best is not None:
            scores, classes, arrived = best
            if arrived is not None:
                arrived.synchronize()
            answers = zip(classes.tolist(), scores.tolist(), strict=True)
        for error in errors:
            if error is not None:
                yield error
            else:
                yield [
                    Prediction(index, self.class_names[index], score)
                    for index, score in zip(*next(answers), strict=True)
                ]


def _output_shape(planner: Planner, image_shape: Shape) -> Shape:
    """Of one image of this shape. Raises NetworkError as `plan` does."""
    return planner.network.output_shape(planner(1, tuple(image_shape)).image_shape)


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether several numbers of an expanded tensor have one place in memory."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return any(step == 0 and side > 1 for side, step in sides)


def _tell_of_defaults(planner: Planner, device: torch.device, dtype: str, batch: int) -> None:
    """One line if nothing of this plan was ever measured on this device, with the cure."""
    if not any(step.tuned for step in planner(batch).steps):
        name = planner.network.name
        print(
            f"no tuned configurations of {name} for {batch} images in {dtype} on "
            f"{torch.cuda.get_device_name(device)}, so defaults are used; measure better ones with "
            f"`alexnet-triton-bench tune --all --model {name} --batch {batch} --dtype {dtype}`",
            file=sys.stderr,
        )
