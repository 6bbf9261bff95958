"""Triton kernels beside their plain-torch twins. The twin is the specification; `impl=` chooses between them."""

from __future__ import annotations

import functools
import importlib.util
from typing import Literal

import torch

Impl = Literal["auto", "triton", "torch"]


def uses_triton(device: torch.device, impl: Impl = "auto") -> bool:
    """Whether a kernel runs on `device`: on a GPU where Triton is installed, unless `impl` says otherwise.

    Triton's interpreter (TRITON_INTERPRET=1) runs kernels on a CPU too, very slowly: only where `impl` is "triton".
    """
    if impl == "auto":
        return device.type == "cuda" and _triton_is_installed()
    return impl == "triton"


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
