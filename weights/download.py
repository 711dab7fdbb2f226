"""The pretrained weights: fetched once, kept in torch.hub's cache, never parsed unchecked."""

from __future__ import annotations

import hashlib
import sys
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import torch

from .state import WeightsError, unfit

# torchvision's AlexNet_Weights.IMAGENET1K_V1; the name of the file carries its SHA-256.
IMAGENET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
IMAGENET_SHA256 = "7be5be79"


def fetch(url: str, sha256: str) -> Path:
    """The file of `url` in torch.hub's cache, downloaded if it is not there yet.

    `sha256` is the beginning of its hash in hexadecimal, checked every time. The download goes to
    a temporary file that takes the final name only when it is whole and right; progress is shown
    on standard error.

    Raises WeightsError when it cannot be had, or when a cached file has another hash.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name)
    try:
        if not path.exists():
            print(f"downloading {url} to {path}", file=sys.stderr)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, HTTPException, RuntimeError) as error:  # network, disk, hash of the download
        raise WeightsError(
            f"cannot get {url} ({error}); cure: connect to the network, "
            f"or download it elsewhere and put it at {path}"
        ) from None
    if not digest.startswith(sha256):
        cure = "delete the file, it will be downloaded again"
        raise unfit(f"{path}:", f"a SHA-256 beginning with {sha256}", digest, cure)
    return path
