"""Dropout as a pure function of (seed, epoch, sequence, position, layer, module, feature), never of an RNG's state.

Recomputing a layer, resuming a run or cutting a micro-batch in two must see the same mask, on any device. So a mask
is a hash: every token has a 32-bit key made from the seed, the epoch, the sequence it belongs to and its position;
each adapted module of each layer mixes in its own salt; each feature is one more round. The mix is a 32-bit multiply
and xor-shift finaliser of the murmur family: no cryptography, but no visible correlation between neighbours either
(tested). It is int32 arithmetic that wraps, which torch does alike on CPU and CUDA. Here are the keys; masks, and the
products that use them, are in kernels/dropped_product.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drawplate.kernels.dropped_product import GOLDEN, mix, wrap_int32


def token_keys(sequence_ids_BT: Tensor, position_ids_BT: Tensor, seed: int, epoch: int) -> Tensor:
    """int32 keys, shape (B, T), that depend on which sequence and position a token is, not on the micro-batch."""
    start = torch.tensor(wrap_int32(seed * 0x9E3779B1 + epoch * 0x85EBCA77 + 0x165667B1), dtype=torch.int32)
    h = mix(sequence_ids_BT.to(torch.int32) ^ start.to(sequence_ids_BT.device))
    return mix(h + position_ids_BT.to(torch.int32) * GOLDEN)


def module_keys(token_keys_BT: Tensor, salts_M: Tensor) -> Tensor:
    """Keys of M modules, shape (M, B, T), from token keys and one int32 salt a module."""
    return mix(token_keys_BT[None] ^ salts_M[:, None, None])
