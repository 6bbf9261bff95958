"""torch's attention backends on padded rows, forward and backward: milliseconds, and how far they lie apart.

    python bench/attention.py OUT.json

Variable-length FlashAttention (what packed rows take, model/layer/attention.py) against FlashAttention and cuDNN
through `scaled_dot_product_attention`, with key heads grouped (gqa1) or repeated before (gqa0), on heads of real
shapes. `_f` is forward, `_fb` forward and backward, `_diff` the largest difference from the variable-length kernel's
output.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

HEADS = {"3b": (24, 8, 128), "8b": (32, 8, 128), "1b": (32, 8, 64)}
ROWS = ((7, 512), (2, 2048), (7, 2048), (1, 4096))
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def milliseconds(run: Callable[[], Any], times: int = 20) -> float:
    """The mean of some runs after untimed ones."""
    for _ in range(3):
        run()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(times):
        run()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / times


def case(shape: str, rows: int, length: int) -> dict[str, Any]:
    """All backends on rows of one length."""
    heads, key_heads, size = HEADS[shape]

    def made(count: int) -> Tensor:
        return torch.randn(rows, length, count, size, device="cuda", dtype=torch.bfloat16).requires_grad_()

    query, key, value, grad = made(heads), made(key_heads), made(key_heads), made(heads).detach()
    borders = torch.arange(0, rows * length + 1, length, device="cuda", dtype=torch.int32)

    def varlen() -> Tensor:
        flat = (x.flatten(0, 1) for x in (query, key, value))
        out = varlen_attn(*flat, borders, borders, length, length, window_size=(-1, 0))
        return out.view(rows, length, heads, size)

    def dense(grouped: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if not grouped:
            k, v = (x.repeat_interleave(heads // key_heads, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)

    def both(run: Callable[[], Tensor]) -> None:
        run().backward(grad)
        query.grad = key.grad = value.grad = None

    row = {"shape": shape, "rows": rows, "T": length, "varlen_f": milliseconds(varlen)}
    row["varlen_fb"] = milliseconds(lambda: both(varlen))
    for name, backend in BACKENDS.items():
        for grouped in (True, False):
            with sdpa_kernel(backend):
                label = f"{name}_gqa{int(grouped)}"
                with torch.no_grad():
                    row[f"{label}_f"] = milliseconds(lambda g=grouped: dense(g))
                row[f"{label}_fb"] = milliseconds(lambda g=grouped: both(lambda: dense(g)))
                row[f"{label}_diff"] = float((dense(grouped) - varlen()).detach().abs().max())
    return row


def main() -> None:
    """Every shape and size, in one JSON file."""
    rows = [case(shape, *size) for shape in HEADS for size in ROWS]
    record = {
        "command": "python " + " ".join(sys.argv),
        "commit": os.environ.get("DRAWPLATE_COMMIT", ""),
        "machine": {"gpu": torch.cuda.get_device_name()},
        "versions": {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()},
        "rows": rows,
    }
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
