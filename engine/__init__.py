"""The engine: a network as data, planned, bound to weights and run.

from alexnet_triton.engine import Engine
engine = Engine.load("alexnet", weights="imagenet")
for prediction in engine.classify("cat.jpg")[0]:
    print(prediction.label, prediction.score)
"""

from typing import TYPE_CHECKING

__all__ = [
    "LPIPS",
    "Engine",
    "EngineError",
    "ImageError",
    "Network",
    "NetworkError",
    "OnnxError",
    "Options",
    "OutputError",
    "PictureError",
    "Prediction",
]

if TYPE_CHECKING:
    from .images import ImageError
    from .jobs.rows import OutputError
    from .load import EngineError
    from .lpips import LPIPS
    from .onnx.file import OnnxError
    from .pictures.canvas import PictureError
    from .plan import Options
    from .run import Engine, Prediction
    from .spec import Network, NetworkError
else:
    _HOMES = {"ImageError": "images", "EngineError": "load", "Network": "spec", "Options": "plan"}
    _HOMES |= {"NetworkError": "spec", "Engine": "run", "Prediction": "run"}
    _HOMES |= {"OnnxError": "onnx.file", "OutputError": "jobs.rows"}
    _HOMES |= {"PictureError": "pictures.canvas", "LPIPS": "lpips"}

    def __getattr__(name: str) -> object:
        """The public names, imported when they are first asked for: torch takes seconds."""
        from importlib import import_module

        if name == "ray":
            return import_module(".jobs.ray", __name__)
        if name in _HOMES:
            return getattr(import_module(f".{_HOMES[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
