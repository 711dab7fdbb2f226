"""The verb `features`: a layer's activations of images as rows, or of one image as a picture."""

from __future__ import annotations

import argparse
from typing import Any

from ..load import EngineError, find
from ..pictures.canvas import SUFFIXES
from ..verbs import draw_features
from .job import over_images, run
from .kinds import Features

_OF_ROWS: dict[str, Any] = {  # the options that mean nothing to a picture, as they are if not given
    **dict.fromkeys(("resume", "overwrite", "retry_errors", "exif"), False),
    **{"workers": 0, "ray": None, "target": None, "batch_size": 256},
}


def run_features(options: argparse.Namespace) -> int:
    """The suffix of the output says which; raises EngineError for options of the other."""
    if options.output.suffix.lower() not in SUFFIXES:
        if options.filters:
            wanted = f"wanted a picture, {', '.join(SUFFIXES)}, got {options.output}"
            raise EngineError(f"--filters: {wanted}; leave it out")
        kind = Features(options.layer).fitted(find(options.model)[0])
        return run(options, over_images(options, kind, layer=kind.layer))
    what = f"{options.output} is a picture of one image"
    if len(options.source) != 1:
        raise EngineError(f"{what}: wanted one, got {len(options.source)}; name rows.parquet")
    for name, absent in _OF_ROWS.items():
        if getattr(options, name) != absent:
            raise EngineError(f"{what}: --{name.replace('_', '-')} is about rows; leave it out")
    return draw_features(options, options.source[0])
