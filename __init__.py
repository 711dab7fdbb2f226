"""AlexNet inference in fused Triton kernels.

from alexnet_triton import Engine
engine = Engine.load("alexnet")
logits = engine(images)
"""

from typing import TYPE_CHECKING

from .errors import Error

__version__ = "0.1.0"

__all__ = [
    "LPIPS",
    "Engine",
    "EngineError",
    "Error",
    "ImageError",
    "LaunchRefused",
    "NetworkError",
    "OnnxError",
    "OutputError",
    "PictureError",
    "Prediction",
    "TuningError",
    "WeightsError",
    "backend",
]

if TYPE_CHECKING:
    from .engine import (
        LPIPS,
        Engine,
        EngineError,
        ImageError,
        NetworkError,
        OnnxError,
        OutputError,
        PictureError,
        Prediction,
    )
    from .engine.dynamo import backend
    from .kernels.jit import LaunchRefused
    from .kernels.tuning import TuningError
    from .weights import WeightsError
else:
    _ELSEWHERE = {
        "LaunchRefused": ".kernels.jit",
        "TuningError": ".kernels.tuning",
        "WeightsError": ".weights",
        "backend": ".engine.dynamo",
    }

    def __getattr__(name: str) -> object:
        """The engine's names and the rooms, imported when they are first asked for."""
        from importlib import import_module

        if name in __all__:
            return getattr(import_module(_ELSEWHERE.get(name, ".engine"), __name__), name)
        if name in ("engine", "kernels", "weights"):
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
