"""The adapter's products with a dropped input, without the dropped input or its mask ever being stored.

A mask is a hash of (token's key, feature), so a kernel makes it in registers while it reads x once:

    down     t_NR = drop(x_NI) A_RI^T
    grad_A   sum over tokens of  grad_t_NR^T drop(x_NI)
    up       drop(grad_t_NR A_RI), what the adapter adds to the gradient of x

In plain torch, compiled, the dropped x of every adapted module would be kept from forward to backward: as much memory
as a layer's input each. The functions here are opaque to the compiler for that reason.

Shapes: N tokens, I features, R rank.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from drawplate.kernels import Impl, uses_triton

_MULTIPLIER_1 = -2048144789  # 0x85EBCA6B as int32
_MULTIPLIER_2 = -1028477387  # 0xC2B2AE35 as int32
GOLDEN = -1640531527  # 0x9E3779B9 as int32


def _shift_right(h: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's is arithmetic on signed integers."""
    return (h >> bits) & ((1 << (32 - bits)) - 1)


def mix(h: Tensor) -> Tensor:
    """int32 -> int32, a bijection that spreads every input bit over every output bit (murmur's finaliser)."""
    h = (h ^ _shift_right(h, 16)) * _MULTIPLIER_1
    h = (h ^ _shift_right(h, 13)) * _MULTIPLIER_2
    return h ^ _shift_right(h, 16)


def wrap_int32(value: int) -> int:
    """Any integer -> the int32 with the same low 32 bits."""
    return (value + 2**31) % 2**32 - 2**31


def threshold_of(dropout: float) -> int:
    """A feature is kept where its hash, as int32, is at least this."""
    return wrap_int32(int(dropout * 2**32) - 2**31)


def dropout_mask(key: Tensor, features: int, dropout: float, dtype: torch.dtype) -> Tensor:
    """0 or 1/(1-dropout), shape (*key.shape, features), from int32 keys of tokens."""
    feature = torch.arange(features, dtype=torch.int32, device=key.device) * GOLDEN
    keep = mix(key[..., None] + feature) >= threshold_of(dropout)
    return keep.to(dtype) * (1 / (1 - dropout))


def down(x_NI: Tensor, key_N: Tensor, lora_A_RI: Tensor, dropout: float, impl: Impl = "auto") -> Tensor:
    """drop(x) A^T, (N, R) in x's dtype."""
    if uses_triton(x_NI.device, impl):
        return _kernels().down(x_NI, key_N, lora_A_RI, dropout)
    return _dropped(x_NI, key_N, dropout) @ lora_A_RI.to(x_NI.dtype).t()


def grad_A(grad_t_NR: Tensor, x_NI: Tensor, key_N: Tensor, dropout: float, impl: Impl = "auto") -> Tensor:
    """grad_t^T drop(x), (R, I); the kernel's in float32, the twin's in x's dtype."""
    if uses_triton(x_NI.device, impl):
        return _kernels().grad_A(grad_t_NR, x_NI, key_N, dropout)
    return grad_t_NR.t() @ _dropped(x_NI, key_N, dropout)


def up(grad_t_NR: Tensor, lora_A_RI: Tensor, key_N: Tensor, dropout: float, impl: Impl = "auto") -> Tensor:
    """drop(grad_t A), (N, I) in grad_t's dtype."""
    if uses_triton(grad_t_NR.device, impl):
        return _kernels().up(grad_t_NR, lora_A_RI, key_N, dropout)
    return _dropped(grad_t_NR @ lora_A_RI.to(grad_t_NR.dtype), key_N, dropout)


def _dropped(x_NI: Tensor, key_N: Tensor, dropout: float) -> Tensor:
    return x_NI * dropout_mask(key_N, x_NI.shape[1], dropout, x_NI.dtype)


@torch.library.custom_op("drawplate::dropped_down", mutates_args=())
def dropped_down(x_NI: Tensor, key_N: Tensor, lora_A_RI: Tensor, dropout: float) -> Tensor:
    """`down`, opaque to the compiler."""
    return down(x_NI, key_N, lora_A_RI, dropout)


@torch.library.custom_op("drawplate::dropped_grad_A", mutates_args=())
def dropped_grad_A(grad_t_NR: Tensor, x_NI: Tensor, key_N: Tensor, dropout: float) -> Tensor:
    """`grad_A` in float32, opaque to the compiler."""
    return grad_A(grad_t_NR, x_NI, key_N, dropout).float()


@torch.library.custom_op("drawplate::dropped_up", mutates_args=())
def dropped_up(grad_t_NR: Tensor, lora_A_RI: Tensor, key_N: Tensor, dropout: float) -> Tensor:
    """`up`, opaque to the compiler."""
    return up(grad_t_NR, lora_A_RI, key_N, dropout)


@dropped_down.register_fake
def _(x_NI: Tensor, key_N: Tensor, lora_A_RI: Tensor, dropout: float) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], lora_A_RI.shape[0])


@dropped_grad_A.register_fake
def _(grad_t_NR: Tensor, x_NI: Tensor, key_N: Tensor, dropout: float) -> Tensor:
    return x_NI.new_empty(grad_t_NR.shape[1], x_NI.shape[1], dtype=torch.float32)


@dropped_up.register_fake
def _(grad_t_NR: Tensor, lora_A_RI: Tensor, key_N: Tensor, dropout: float) -> Tensor:
    return grad_t_NR.new_empty(grad_t_NR.shape[0], lora_A_RI.shape[1])


@functools.cache
def _kernels() -> ModuleType:
    """The Triton half, imported when it is first needed: Triton is optional and slow to import."""
    from drawplate.kernels import dropped_product_triton

    return dropped_product_triton
