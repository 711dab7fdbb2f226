"""Labels for a table of images, by Ray Data: on this machine's cores, or on a cluster's GPUs.

    python examples/ray_data.py photos.parquet labels --workers 4

photos.parquet, a file or a folder of such, has a column `path` of files and URLs, or besides it a
column `bytes` of encoded images; all its other columns come through. The folder `labels` gets a row
an image in Parquet: its likeliest class and how likely that is, or why there is none. Nothing is
downloaded, and no GPU is used, with `--model digits --backend torch`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import ray.data
from alexnet_triton.engine.ray import classify


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """The best of the predictions as columns of its own."""
    best = (row.pop("predictions") or [{"label": None, "score": None}])[0]
    return row | {"label": best["label"], "score": best["score"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, classify, write; nothing runs before the last line, and memory stays flat."""
    parser = argparse.ArgumentParser(description="Labels for a table of images.")
    parser.add_argument("photos")
    parser.add_argument("labels")
    parser.add_argument("--model", default="alexnet")
    parser.add_argument("--weights")
    parser.add_argument("--backend", default="triton", choices=("triton", "torch"))
    parser.add_argument("--workers", type=int, default=1, help="engines at once, a GPU each")
    how = vars(parser.parse_args(arguments))
    photos, labels = ray.data.read_parquet(how.pop("photos")), how.pop("labels")
    classify(photos, **how, top=1).map(flat).write_parquet(labels)


if __name__ == "__main__":
    main()
