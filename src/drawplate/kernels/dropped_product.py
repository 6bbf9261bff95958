"""The adapters' products with a dropped input, without the dropped input or its mask ever being stored.

A mask is a hash of (token's key, feature), so a kernel makes it in registers while it reads x once. The modules that
read the same x (queries, keys and values; gate and up) are done together, each with a mask of its own:

    down     t_GNR = drop_g(x_NI) A_gRI^T
    grad_A   sum over tokens of  grad_t_gNR^T drop_g(x_NI)
    up       sum over modules of drop_g(grad_t_gNR A_gRI), what the adapters add to the gradient of x

In plain torch, compiled, the dropped x of every adapted module would be kept from forward to backward: as much memory
as a layer's input each. The functions here are opaque to the compiler for that reason. The kernels spend most of their
time on the hash, so one serves two features, 64 apart, with 16 bits each.

Shapes: G modules, N tokens, I features, R rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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


HALF = 64
"""Features f and f + HALF of every 2 * HALF share a hash: its lower 16 bits are the first's, its upper the second's."""
MOST_MODULES = 3


def threshold_of(dropout: float) -> int:
    """A feature is kept where its 16 bits are at least this."""
    return round(dropout * 2**16)


def dropout_mask(key: Tensor, features: int, dropout: float, dtype: torch.dtype) -> Tensor:
    """0 or 1/(1-dropout), shape (*key.shape, features), from int32 keys of tokens."""
    pairs = -(-features // (2 * HALF)) * HALF
    pair = torch.arange(pairs, dtype=torch.int32, device=key.device) * GOLDEN
    h = mix(key[..., None] + pair).unflatten(-1, (-1, HALF))
    bits = torch.stack([h & 0xFFFF, _shift_right(h, 16)], dim=-2).flatten(-3)[..., :features]
    return (bits >= threshold_of(dropout)).to(dtype) * (1 / (1 - dropout))


def down(
    x_NI: Tensor, keys_N: Sequence[Tensor], lora_As: Sequence[Tensor], dropout: float, impl: Impl = "auto"
) -> Tensor:
    """drop(x) A^T of each module, (G, N, R) in x's dtype."""
    if uses_triton(x_NI.device, impl):
        return _kernels().down(x_NI, keys_N, lora_As, dropout)
    pairs = zip(keys_N, lora_As, strict=True)
    return torch.stack([_dropped(x_NI, key_N, dropout) @ A_RI.to(x_NI.dtype).t() for key_N, A_RI in pairs])


def grad_A(
    grad_ts: Sequence[Tensor], x_NI: Tensor, keys_N: Sequence[Tensor], dropout: float, impl: Impl = "auto"
) -> list[Tensor]:
    """grad_t^T drop(x) of each module, (R, I) each; the kernel's in float32, the twin's in x's dtype."""
    if uses_triton(x_NI.device, impl):
        return _kernels().grad_A(grad_ts, x_NI, keys_N, dropout)
    return [t_NR.t() @ _dropped(x_NI, key_N, dropout) for t_NR, key_N in zip(grad_ts, keys_N, strict=True)]


def up(
    grad_ts: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    keys_N: Sequence[Tensor],
    dropout: float,
    impl: Impl = "auto",
) -> Tensor:
    """The sum over modules of drop(grad_t A), (N, I) in grad_t's dtype."""
    if uses_triton(grad_ts[0].device, impl):
        return _kernels().up(grad_ts, lora_As, keys_N, dropout)
    modules = zip(grad_ts, lora_As, keys_N, strict=True)
    parts = [_dropped(t_NR @ A_RI.to(t_NR.dtype), key_N, dropout) for t_NR, A_RI, key_N in modules]
    return functools.reduce(torch.add, parts)


def _dropped(x_NI: Tensor, key_N: Tensor, dropout: float) -> Tensor:
    return x_NI * dropout_mask(key_N, x_NI.shape[1], dropout, x_NI.dtype)


@torch.library.custom_op("drawplate::dropped_down", mutates_args=())
def dropped_down(x_NI: Tensor, keys_N: list[Tensor], lora_As: list[Tensor], dropout: float) -> Tensor:
    """`down`, opaque to the compiler."""
    return down(x_NI, keys_N, lora_As, dropout)


@torch.library.custom_op("drawplate::dropped_grad_A", mutates_args=())
def dropped_grad_A(grad_ts: list[Tensor], x_NI: Tensor, keys_N: list[Tensor], dropout: float) -> list[Tensor]:
    """`grad_A` in float32, opaque to the compiler."""
    return [grad_RI.float() for grad_RI in grad_A(grad_ts, x_NI, keys_N, dropout)]


@torch.library.custom_op("drawplate::dropped_up", mutates_args=())
def dropped_up(grad_ts: list[Tensor], lora_As: list[Tensor], keys_N: list[Tensor], dropout: float) -> Tensor:
    """`up`, opaque to the compiler."""
    return up(grad_ts, lora_As, keys_N, dropout)


@dropped_down.register_fake
def _(x_NI: Tensor, keys_N: list[Tensor], lora_As: list[Tensor], dropout: float) -> Tensor:
    return x_NI.new_empty(len(lora_As), x_NI.shape[0], lora_As[0].shape[0])


@dropped_grad_A.register_fake
def _(grad_ts: list[Tensor], x_NI: Tensor, keys_N: list[Tensor], dropout: float) -> list[Tensor]:
    return [x_NI.new_empty(grad_t_NR.shape[1], x_NI.shape[1], dtype=torch.float32) for grad_t_NR in grad_ts]


@dropped_up.register_fake
def _(grad_ts: list[Tensor], lora_As: list[Tensor], keys_N: list[Tensor], dropout: float) -> Tensor:
    return grad_ts[0].new_empty(grad_ts[0].shape[0], lora_As[0].shape[1])


@functools.cache
def _kernels() -> ModuleType:
    """The Triton half, imported when it is first needed: Triton is optional and slow to import."""
    from drawplate.kernels import dropped_product_triton

    return dropped_product_triton
