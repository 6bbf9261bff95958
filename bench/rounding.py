"""How far roundings carry a random model's hidden states away, layer by layer; on a CPU, in two minutes.

    python bench/rounding.py OUT.json

A Llama-like model of 32 layers, narrow, with weights of the size that 4,096 wide ones have in effect, is run forward in
float32 beside copies of itself whose products round their weights, their inputs or both. Twice: with plain random
weights, and with those of the comparison (bench/peers/material.py), whose layers add little to the residual, as a
trained model's do. Said is the relative distance of the normed hidden states from the unrounded model's.

Left out: gradients, and what rounding does to trained weights (bench/precision_cost.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.peers.material import DEVIATION, LAYER_NORM, RESIDUAL_SHARE  # noqa: E402

HIDDEN, INTERMEDIATE, LAYERS, TOKENS, HEAD, KEY_HEADS = 1024, 3584, 32, 256, 128, 2
WIDE = 4096
SHOWN = (1, 4, 16, 32)
Rounding = Callable[[Tensor], Tensor]


def fp8_rows(x_NK: Tensor) -> Tensor:
    """e4m3 with a scale a row, as Drawplate's products."""
    from drawplate.kernels.fp8_rows import fp8_rows

    rounded_NK, scale_N1 = fp8_rows(x_NK)
    return rounded_NK.float() * scale_N1


def fp8_blocks(x_NK: Tensor) -> Tensor:
    """e4m3 with a scale for each 128 numbers of a row."""
    return fp8_rows(x_NK.reshape(-1, 128)).view_as(x_NK)


def int8_rows(x_NK: Tensor) -> Tensor:
    """256 even steps with a scale a row."""
    scale_N1 = x_NK.abs().amax(1, keepdim=True) / 127
    return (x_NK / scale_N1).round() * scale_N1


def nf4(x_NK: Tensor) -> Tensor:
    """bitsandbytes' NF4 with double quantization."""
    from drawplate.model.base.precision import Storage

    storage, shape = Storage("nf4"), (x_NK.shape[0], x_NK.shape[1])
    encoded = storage.encode(x_NK)
    return storage.decode([encoded[name] for name in storage.specs(*shape)], shape, torch.float32)


def bf16(x: Tensor) -> Tensor:
    """8 bits of mantissa."""
    return x.bfloat16().float()


def exact(x: Tensor) -> Tensor:
    """As it is."""
    return x


ROUNDINGS: dict[str, tuple[Rounding, Rounding]] = {
    "exact": (exact, exact),
    "bf16": (bf16, bf16),
    "int8 by rows": (int8_rows, int8_rows),
    "fp8 by rows": (fp8_rows, fp8_rows),
    "fp8 by rows, weights alone": (fp8_rows, exact),
    "fp8 by rows, inputs alone": (exact, fp8_rows),
    "fp8 by blocks of 128": (fp8_blocks, fp8_blocks),
    "nf4 weights": (nf4, exact),
}
"""What becomes of a product's weight and of its input."""


def normed(x_NH: Tensor) -> Tensor:
    """RMS norm."""
    return x_NH * torch.rsqrt(x_NH.square().mean(1, keepdim=True) + 1e-5)


def rotated(x_GND: Tensor) -> Tensor:
    """Rotary embeddings."""
    inverse_D = 500000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)
    angle_ND = (torch.arange(TOKENS)[:, None] * inverse_D).repeat(1, 2)
    first, second = x_GND.chunk(2, -1)
    return x_GND * angle_ND.cos() + torch.cat([-second, first], -1) * angle_ND.sin()


def layer_weights(deviation: float, residual_share: float) -> dict[str, Tensor]:
    """One layer's matrices by name."""
    keys = KEY_HEADS * HEAD
    into = {"q": HIDDEN, "k": keys, "v": keys, "gate": INTERMEDIATE, "up": INTERMEDIATE}
    weights = {name: torch.randn(rows, HIDDEN) * deviation for name, rows in into.items()}
    back = {"o": HIDDEN, "down": INTERMEDIATE}
    return weights | {name: torch.randn(HIDDEN, n) * deviation * residual_share for name, n in back.items()}


def layer(x_NH: Tensor, norm: float, product: Callable[[str, Tensor], Tensor]) -> Tensor:
    """A decoder layer."""
    y_NH = normed(x_NH) * norm
    q, k, v = (product(name, y_NH).view(TOKENS, -1, HEAD).transpose(0, 1) for name in "qkv")
    groups = len(q) // KEY_HEADS
    keys, values = (t.repeat_interleave(groups, 0)[None] for t in (rotated(k), v))
    attended = F.scaled_dot_product_attention(rotated(q)[None], keys, values, is_causal=True)
    x_NH = x_NH + product("o", attended[0].transpose(0, 1).reshape(TOKENS, HIDDEN))
    y_NH = normed(x_NH) * norm
    return x_NH + product("down", F.silu(product("gate", y_NH)) * product("up", y_NH))


@torch.no_grad()
def distances(norm: float, residual_share: float) -> dict[str, list[float]]:
    """Of each rounding, after the layers `SHOWN`."""
    torch.manual_seed(0)
    deviation = DEVIATION * (WIDE / HIDDEN) ** 0.5
    ids = torch.multinomial(1 / torch.arange(1, 513.0), TOKENS, replacement=True)
    embedded = (torch.randn(512, HIDDEN) * DEVIATION)[ids]
    hidden = dict.fromkeys(ROUNDINGS, embedded)
    found: dict[str, list[float]] = {name: [] for name in ROUNDINGS if name != "exact"}
    for number in range(1, LAYERS + 1):
        weights = layer_weights(deviation, residual_share)
        for name, (of_weight, of_input) in ROUNDINGS.items():
            rounded = {key: of_weight(weight) for key, weight in weights.items()}
            product = lambda key, x, w=rounded, r=of_input: r(x) @ w[key].t()  # noqa: E731
            hidden[name] = layer(hidden[name], norm, product)
        if number in SHOWN:
            true = normed(hidden["exact"])
            for name, values in found.items():
                values.append(round(float((normed(hidden[name]) - true).norm() / true.norm()), 4))
    return found


def main() -> None:
    """Both models; print and write."""
    from bench.about import about

    results: list[dict[str, Any]] = []
    for model, norm, share in (("plain", 1.0, 1.0), ("the comparison's", LAYER_NORM, RESIDUAL_SHARE)):
        for rounding, values in distances(norm, share).items():
            by_layer = dict(zip(map(str, SHOWN), values, strict=True))
            results.append({"model": model, "rounding": rounding, "distance_after_layers": by_layer})
            print(results[-1], flush=True)
    Path(sys.argv[1]).write_text(json.dumps({**about(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
