"""The engine: a network as data, planned, bound to weights and run.

from alexnet_triton.engine import Engine
engine = Engine.load("alexnet", weights="imagenet")
for prediction in engine.classify("cat.jpg")[0]:
    print(prediction.label, prediction.score)
"""

from .images import ImageError
from .load import EngineError
from .run import Engine, Prediction
from .spec import Network, NetworkError

__all__ = ["Engine", "EngineError", "ImageError", "Network", "NetworkError", "Prediction"]
