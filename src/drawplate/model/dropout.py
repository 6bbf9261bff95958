"""Dropout as a pure function of (seed, epoch, sequence, position, layer, module, feature), never of an RNG's state.

Recomputing a layer, resuming a run or cutting a micro-batch in two must see the same mask, on any device. So a mask
is a hash: every token has a 32-bit key made from the seed, the epoch, the sequence it belongs to and its position;
each adapted module of each layer mixes in its own salt; each feature is one more round. The mix is a 32-bit multiply
and xor-shift finaliser of the murmur family: no cryptography, but no visible correlation between neighbours either
(tested). It is int32 arithmetic that wraps, which torch does alike on CPU and CUDA and which a compiler fuses into
its neighbour.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER_1 = -2048144789  # 0x85EBCA6B as int32
_MULTIPLIER_2 = -1028477387  # 0xC2B2AE35 as int32
_GOLDEN = -1640531527  # 0x9E3779B9 as int32


def _shift_right(h: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's is arithmetic on signed integers."""
    return (h >> bits) & ((1 << (32 - bits)) - 1)


def mix(h: Tensor) -> Tensor:
    """int32 -> int32, a bijection that spreads every input bit over every output bit."""
    h = (h ^ _shift_right(h, 16)) * _MULTIPLIER_1
    h = (h ^ _shift_right(h, 13)) * _MULTIPLIER_2
    return h ^ _shift_right(h, 16)


def wrap_int32(value: int) -> int:
    """Any integer -> the int32 with the same low 32 bits."""
    return (value + 2**31) % 2**32 - 2**31


def token_keys(sequence_ids_BT: Tensor, position_ids_BT: Tensor, seed: int, epoch: int) -> Tensor:
    """int32 keys, shape (B, T), that depend on which sequence and position a token is, not on the micro-batch."""
    start = torch.tensor(wrap_int32(seed * 0x9E3779B1 + epoch * 0x85EBCA77 + 0x165667B1), dtype=torch.int32)
    h = mix(sequence_ids_BT.to(torch.int32) ^ start.to(sequence_ids_BT.device))
    return mix(h + position_ids_BT.to(torch.int32) * _GOLDEN)


def module_keys(token_keys_BT: Tensor, salts_M: Tensor) -> Tensor:
    """Keys of M modules, shape (M, B, T), from token keys and one int32 salt a module."""
    return mix(token_keys_BT[None] ^ salts_M[:, None, None])


def dropout_mask(key_BT: Tensor, features: int, dropout: float, dtype: torch.dtype) -> Tensor:
    """0 or 1/(1-dropout), shape (B, T, features)."""
    feature = torch.arange(features, dtype=torch.int32, device=key_BT.device) * _GOLDEN
    threshold = wrap_int32(int(dropout * 2**32) - 2**31)
    keep = mix(key_BT[..., None] + feature) >= threshold
    return keep.to(dtype) * (1 / (1 - dropout))
