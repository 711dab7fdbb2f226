"""Weights: one canonical state, `{"conv1.weight": float32 tensor, ...}`, from any source.

    state = load("imagenet", expected, network="alexnet")

`expected` maps every tensor name to its shape, in network order. What comes back has exactly those
names in that order; every tensor is float32, contiguous, on the CPU, finite, and a copy of its
own. Whatever does not fit raises `WeightsError` in one line, before anything runs. The sources:

`"imagenet"`
    torchvision's AlexNet, IMAGENET1K_V1; for network "alexnet". Downloaded once into the
    checkpoints folder of `torch.hub.get_dir()`; its SHA-256 is checked before it is parsed, also
    when it was there already.
`"digits"`
    The embedded model (see `digits/README.md`); for network "digits".
`"random:SEED"`
    He-scaled normal weights and small biases for any network; the same SEED (0 to 2**32 - 1)
    gives the same numbers, and torch's global random state is neither read nor moved.
a path (`str` or `Path`)
    A `.pth`, `.pt`, `.tar`, `.ckpt` or `.bin` file of torch.save, of which nothing is ever run as
    code and whose checksums are checked where its format has them, or a `.safetensors` file; or a
    `.keras` or `.weights.h5` file of Keras 3 (see `keras.py`), which needs h5py and `flattened`.
a state dict
    Any mapping from names to tensors of any float dtype, on any device.

Files and dicts may use the canonical names or torchvision's (`features.0.weight`,
`classifier.1.bias`), may be nested as `{"state_dict": {...}}`, and may carry the `module.` of
DataParallel, the `_orig_mod.` of torch.compile or the `model.` of Lightning in their names: all of
that is taken off.
"""

from .save import save
from .sources import Source, load
from .state import WeightsError

__all__ = ["Source", "WeightsError", "load", "save"]
