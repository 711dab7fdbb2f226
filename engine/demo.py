"""The main job in small: classify the held-out digits with the embedded model, and prove it.

The same images go through the Triton kernels and through torch; the demo succeeds only if both
give the same answer for every image.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..weights.digits import heldout
from .images import to_batch
from .run import Engine


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo saw. `largest_difference` is between our logits and torch's, absolute."""

    device: str
    dtype: str
    images: int
    top1: float
    same_answers: int
    largest_difference: float
    largest_logit: float
    seconds: float
    samples: tuple[tuple[str, str, float], ...]  # file, label, score

    @property
    def passed(self) -> bool:
        """Whether every image got torch's answer."""
        return self.same_answers == self.images

    @property
    def images_per_second(self) -> float:
        """Throughput of the second run, pixels in memory to logits."""
        return self.images / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return asdict(self) | {
            "passed": self.passed,
            "images_per_second": self.images_per_second,
        }

    def __str__(self) -> str:
        verdict = "same answer as torch" if self.passed else "DIFFERENT ANSWERS FROM TORCH"
        lines = [f"device               {self.device}, {self.dtype}"]
        lines += [f"  {file:<18} {label} ({score:.1%})" for file, label, score in self.samples]
        lines += [
            f"images               {self.images} held-out digits, never trained on",
            f"top-1                {self.top1:.2%}",
            f"{verdict:<20} {self.same_answers} of {self.images}",
            f"largest difference   {self.largest_difference:.1e} (largest logit "
            f"{self.largest_logit:.1f})",
            f"images/s             {self.images_per_second:,.0f}",
        ]
        return "\n".join(lines)


def demo(
    device: str | None = None,
    dtype: str | None = None,
    target: str | None = None,
    images: int | None = None,
) -> Demo:
    """Run it on the first `images`, None: all. On a CPU the kernels are interpreted, with a
    `target` in that card's plan, and the speed says nothing of a GPU's.
    """
    files = heldout()
    files = files[:: max(1, len(files) // images)][:images] if images else files
    labels = torch.tensor([label for _, label in files])
    engine = Engine.load("digits", None, device, dtype, max_batch=len(files), target=target)
    # A card's halves on a CPU are told by their own yardstick: oneDNN's fp16 is another matter.
    peer = "fp32" if target else engine.dtype
    torch_engine = Engine.load("digits", device=engine.device, dtype=peer, backend="torch")
    batch = to_batch([path for path, _ in files], engine.network.preprocess).to(engine.device)
    expected = torch_engine(batch).cpu()
    if engine.device.type == "cuda":
        engine(batch)  # compile first: speed below is the kernels', not the compiler's
        torch.cuda.synchronize(engine.device)
    started = time.perf_counter()
    logits = engine(batch).cpu()  # waits for the GPU
    seconds = time.perf_counter() - started
    answers = logits.argmax(1)
    scores = logits.softmax(1)
    shown = list(zip(files, answers, scores, strict=True))[:: -(-len(files) // 5)]
    samples = tuple(
        ("/".join(path.parts[-2:]), engine.class_names[int(answer)], float(score[answer]))
        for (path, _), answer, score in shown
    )
    plan = f" in the plan of {target}" if target else ""
    name = f"CPU, Triton's interpreter{plan}: images/s is not a GPU's"
    if engine.device.type == "cuda":
        name = torch.cuda.get_device_name(engine.device)
    return Demo(
        device=name,
        dtype=engine.dtype,
        images=len(files),
        top1=(answers == labels).float().mean().item(),
        same_answers=int((answers == expected.argmax(1)).sum()),
        largest_difference=(logits - expected).abs().max().item(),
        largest_logit=expected.abs().max().item(),
        seconds=seconds,
        samples=samples,
    )
