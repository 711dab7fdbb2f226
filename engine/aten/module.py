"""An nn.Module as a network and its weights, through torch.export: `read(model, (3, 224, 224))`."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ..chain import State
from ..spec import Network, NetworkError, Shape
from .graph import read as read_graph

_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)


def read(model: nn.Module, input_shape: Shape) -> tuple[Network, State]:
    """The chain of layers that `model` is on images `input_shape`, and a copy of its weights.

    It may be on any device and in any float dtype. Raises NetworkError, in one line, for a module
    in training mode, one that torch.export cannot trace or that is no chain of the vocabulary.
    """
    name = type(model).__name__
    if isinstance(model, nn.DataParallel):
        raise NetworkError(f"{name}: wanted a module on one device; give its .module")
    for path, part in model.named_modules():
        if part.training:
            where = f", its {path} is" if path else ""
            raise NetworkError(f"{name}: in training mode{where}; call .eval() on it first")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for path, tensor in tensors:
        if type(tensor) not in _PLAIN or tensor.is_meta or tensor.layout is not torch.strided:
            got = "one without data" if tensor.is_meta else f"a {type(tensor).__name__}"
            raise NetworkError(f"{name}, {path}: wanted a plain dense tensor, got {got}")
    like = next((t for _, t in tensors if t.is_floating_point()), torch.empty(0))
    images = torch.empty(2, *input_shape, dtype=like.dtype, device=like.device)
    quiet = logging.root.manager.disable
    try:
        logging.disable(logging.ERROR)  # torch tells of a module that raises by its own stack
        shapes = torch.export.ShapesCollection()  # whatever its forward calls them
        shapes[images] = {0: torch.export.Dim.DYNAMIC}
        with torch.no_grad():
            batch = shapes.dynamic_shapes(model, (images,))
            exported = torch.export.export(model, (images,), dynamic_shapes=batch, strict=False)
    except Exception as error:  # the module's own code runs there, and may raise anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise NetworkError(
            f"{name}: torch.export cannot trace it on one tensor {[2, *input_shape]}: {lines[0]}"
        ) from None
    finally:
        logging.disable(quiet)
    signature = exported.graph_signature
    stored: dict[str, Any] = {**exported.state_dict, **exported.constants}
    places = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    constants = {node: stored[path] for node, path in places.items()}
    return read_graph(exported.graph, constants, name)
