"""LPIPS: how far apart two images look, by AlexNet's five convolutions.

    lpips = LPIPS()
    distance = lpips(a, b)  # [N, 1, 1, 1] of images [N, 3, H, W] from -1 to 1

It equals `lpips.LPIPS(net="alex")`, version 0.1 (Zhang et al., CVPR 2018). Both batches go through
the network in one run, and `kernels/lpips.py` reads the activations where that leaves them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels import layout
from ..kernels import lpips as kernel
from ..kernels.jit import OLDEST
from ..kernels.lpips import DistanceShape
from ..weights import Source
from ..weights.lpips import heads
from .images import ImageError
from .load import Backend, at_least_one, load_state, of_kind
from .run import Engine
from .zoo import ALEXNET

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")
_LAST = [name for name, _ in ALEXNET.layers].index("relu5") + 1
TRUNK = replace(ALEXNET, layers=ALEXNET.layers[:_LAST], classes="")
"""AlexNet up to relu5: images from 31x31 fit, and no fully connected weight is packed."""

# What LPIPS takes for the mean and the deviation of pixels from -1 to 1.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS:
    """The distance of images: 0 for equal ones, the same in either order.

    weights: an AlexNet's, from any source that `Engine.load` takes; None is ImageNet's. device,
    dtype, backend and target are those of `Engine.load`. spatial: a distance for every pixel
    instead of their mean. max_batch: pairs of one piece; more are cut. By the engine's own kernels
    a pair has the same bits wherever it stands in a batch. It is no nn.Module: it runs on `device`
    and has nothing to be called `.eval()` or `.cuda()` for.

    Safe to call from many threads; it belongs to the process that made it. Raises as `Engine.load`
    does. Near pixels of no activation torchmetrics differs: see `kernels/lpips.py`.
    """

    def __init__(
        self,
        weights: Source | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        backend: Backend = "triton",
        *,
        spatial: bool = False,
        max_batch: int = 64,
        target: str | None = None,
    ) -> None:
        of_kind("spatial", spatial, bool)
        self.spatial = spatial
        self.max_batch = at_least_one("max_batch", max_batch)
        _, state = load_state(ALEXNET, ALEXNET.weights if weights is None else weights)
        trunk = {name: state[name] for name in TRUNK.parameter_shapes()}
        many = 2 * self.max_batch
        self._engine = Engine.load(TRUNK, trunk, device, dtype, backend, many, target=target)
        self.device = self._engine.device
        # A torch engine plans for no card that is too old for it; this kernel runs there, too.
        arch = self._engine.plan.arch
        self._arch = arch or (None if self.device.type == "cpu" else OLDEST)
        self._empty = partial(torch.empty, dtype=torch.float32, device=self.device)
        self._heads = {name: head.to(self.device) for name, head in heads().items()}
        float32 = partial(torch.tensor, dtype=torch.float32, device=self.device)
        self._shift, self._scale = (float32(c)[:, None, None] for c in (SHIFT, SCALE))

    @overload
    def __call__(
        self, in0: Tensor, in1: Tensor, retPerLayer: Literal[False] = False, normalize: bool = False
    ) -> Tensor: ...

    @overload
    def __call__(
        self, in0: Tensor, in1: Tensor, retPerLayer: Literal[True], normalize: bool = False
    ) -> tuple[Tensor, list[Tensor]]: ...

    def __call__(
        self, in0: Tensor, in1: Tensor, retPerLayer: bool = False, normalize: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Distances, float32 [N, 1, 1, 1] on the engine's device; [N, 1, H, W] if spatial.

        in0, in1: float images [N, 3, H, W] of one size from 31x31 up, or grey ones [N, 1, H, W],
        from -1 to 1, or from 0 to 1 with `normalize`; one image stands against all of the other
        batch. With `retPerLayer` also the list of the five layers' parts, of which the distance is
        the sum.

        Raises ImageError for images that are none, or differ in size or number, and NetworkError
        for such that are too small.
        """
        a, b = (self._checked(name, images) for name, images in (("in0", in0), ("in1", in1)))
        if a.shape[2:] != b.shape[2:] or (len(a) != len(b) and 1 not in (len(a), len(b))):
            raise ImageError(
                "in1",
                f"wanted {list(a.shape)} like in0, or one image of that size, got {list(b.shape)}",
            )
        count = len(b) if len(a) == 1 else len(a)
        sides = a.shape[2:] if self.spatial else (1, 1)
        parts = [self._empty(count, 1, *sides) for _ in LAYERS]
        whole = min(count, self.max_batch)
        configured_for = min(len(a), whole) + min(len(b), whole)
        for start in range(0, count, self.max_batch):
            rows = slice(start, start + self.max_batch)
            pair = [x if len(x) == 1 else x[rows] for x in (a, b)]
            images = torch.cat([self._scaled(x, normalize) for x in pair])
            self._engine._foretell(images, LAYERS, configured_for)
            with self._engine._running(images, LAYERS, configured_for) as outputs:
                for name, part in zip(LAYERS, parts, strict=True):
                    self._measure(name, outputs[name], len(pair[0]), part[rows])
        total = sum(parts[1:], start=parts[0])
        return (total, parts) if retPerLayer else total

    def _checked(self, name: str, images: object) -> Tensor:
        """A batch of float images [N, 3, H, W]. Raises ImageError naming the argument."""
        if isinstance(images, Tensor) and not images.is_nested and images.shape[1:2] == (1,):
            images = images.expand(-1, 3, *images.shape[2:])  # grey, as lpips takes it
        try:
            batch = self._engine._batch(images)
        except ImageError as error:
            raise ImageError(name, f"{error.item}: {error.reason}") from None
        if not batch.is_floating_point():
            raise ImageError(
                name, "wanted floats from -1 to 1, got uint8 pixels; pass images / 127.5 - 1"
            )
        return batch

    def _scaled(self, images: Tensor, normalize: bool) -> Tensor:
        """Images as the first layer wants them, on the device that runs it."""
        x = images.to(self.device, torch.float32)
        x = 2 * x - 1 if normalize else x
        return (x - self._shift).div(self._scale)

    def _measure(self, name: str, output: Tensor, first: int, part: Tensor) -> None:
        """Fill `part` [N, 1, ...] from a layer's output, whose `first` images are those of in0."""
        # torch's output may have any strides; the engine's own lies as the kernel wants it.
        packed = self._engine.backend == "torch"
        taps = layout.pack(output) if packed else output.permute(2, 3, 0, 1)
        height, width, _, channels = taps.shape
        pairs = len(part)
        a, b = (x.expand(-1, -1, pairs, -1) for x in (taps[:, :, :first], taps[:, :, first:]))
        shape = DistanceShape(pairs, channels, height, width)
        config = kernel.default_config(shape, self._arch)
        y = self._empty(height, width, pairs)
        kernel.distances(a, b, self._heads[name], y, shape, config)()
        if self.spatial:
            maps = y.permute(2, 0, 1)[:, None]
            part.copy_(F.interpolate(maps, part.shape[2:], mode="bilinear", align_corners=False))
        else:
            kernel.means(y, part.view(-1), shape, config)()
