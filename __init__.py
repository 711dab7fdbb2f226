"""AlexNet inference in fused Triton kernels.

from alexnet_triton import Engine
engine = Engine.load("alexnet")
logits = engine(images)
"""

from .engine import Engine, EngineError, ImageError, NetworkError, Prediction

__all__ = ["Engine", "EngineError", "ImageError", "NetworkError", "Prediction"]
