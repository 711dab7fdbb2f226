"""The numbers an engine can compute in, by name; `plan.ARITHMETIC` says them in torch's words."""

from __future__ import annotations

DTYPES = {
    "fp32": ("float32", "ieee"),
    "tf32": ("float32", "tf32"),
    "fp16": ("float16", "ieee"),
    "bf16": ("bfloat16", "ieee"),
}
"""The dtype of activations and weights, and the precision of float32 products."""
