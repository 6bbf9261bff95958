"""The kernels on a GPU: right first, then fast. Every kernel against its plain-torch twin and against float32.

    python bench/kernel_times.py OUT.json [NAME ...]

NAME is `loss`, `fp8` or `four_bits`; all by default. A case whose error against float32 is more than 1.25
times that of plain torch in the same dtype gets no time. Times are medians over runs of a warmed-up call.

`loss`: the head's cross-entropy with its gradient, kernels against plain torch between the same two products, and those
two products alone.

`fp8`: one frozen product, x @ W.T, in bf16, in fp8 with a scale a row (what model/layer/frozen_product.py does), in fp8
with one scale a tensor, and what rounding x to fp8 takes, compiled; and the same with sums promoted to float32 on the
way (`slow`), with both errors against float32 products of the same rounded numbers.

`four_bits`: dequantizing an NF4 matrix.
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

from drawplate.layout import loss_tile  # noqa: E402
from drawplate.model.ends.head import Head, ResidentRows  # noqa: E402
from drawplate.model.ends.loss import IGNORED, head_cross_entropy  # noqa: E402
from drawplate.model.ends.loss_tile import LossShape, Tile  # noqa: E402

VOCAB = 128256
ALLOWED_ERROR_RATIO = 1.25
MIB = 2**20


def milliseconds(call: Callable[[], object], runs: int = 7) -> float:
    """Median over some runs, after two that do not count."""
    spent = []
    for i in range(runs + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        if i > 1:
            spent.append(start.elapsed_time(stop))
    return round(sorted(spent)[runs // 2], 3)


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def loss_problem(tokens: int, hidden: int) -> tuple[torch.Tensor, Head, torch.Tensor]:
    """Hidden states, a head and targets of a model that is right now and then."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    weight_VH = torch.randn(VOCAB, hidden, generator=generator, device="cuda").mul_(0.02).bfloat16()
    targets_N = torch.randint(0, VOCAB, (tokens,), generator=generator, device="cuda")
    hidden_NH = torch.randn(tokens, hidden, generator=generator, device="cuda").bfloat16()
    hidden_NH[::2] += 10 * weight_VH[targets_N[::2]]
    targets_N[5::100] = IGNORED
    return hidden_NH.requires_grad_(), Head(weights=ResidentRows(weight_VH)), targets_N


def loss_and_gradient(hidden_NH: torch.Tensor, head: Head, targets_N: torch.Tensor, impl: str) -> list[torch.Tensor]:
    """-> [nats, gradient]."""
    counted = int((targets_N != IGNORED).sum())
    loss, nats_N = head_cross_entropy(hidden_NH, head, targets_N, counted=counted, impl=impl)  # type: ignore[arg-type]
    return [nats_N, *torch.autograd.grad(loss, hidden_NH)]


def loss_errors(tokens: int, hidden: int) -> dict[str, list[float]]:
    """Relative errors of nats and gradient against float32 logits, of the kernels, their twin and the plain loss."""
    hidden_NH, head, targets_N = loss_problem(tokens, hidden)
    wide = hidden_NH.detach().float().requires_grad_()
    wide_head = Head(weights=ResidentRows(head.weights.weight_VH.float()))  # type: ignore[attr-defined]
    exact = loss_and_gradient(wide, wide_head, targets_N, "reference")
    return {
        impl: [relative(*pair) for pair in zip(loss_and_gradient(hidden_NH, head, targets_N, impl), exact, strict=True)]
        for impl in ("triton", "torch", "reference")
    }


def products_alone(hidden_NH: torch.Tensor, head: Head) -> float:
    """The two products of every tile, with nothing between them."""
    tile = Tile.of(LossShape.of(hidden_NH, head), len(hidden_NH))
    tile.allocate(hidden_NH.shape[1])
    gradient_NH, hidden_NH = torch.zeros_like(hidden_NH, dtype=torch.float32), hidden_NH.detach()

    def run() -> None:
        for _, weight_VH in head.weights.chunks():
            for start in range(0, len(weight_VH), tile.columns):
                rows_VH = weight_VH[start : start + tile.columns]
                for first in range(0, len(hidden_NH), tile.tokens):
                    block = slice(first, first + tile.tokens)
                    weights_BV = tile.weights(tile.logits(hidden_NH[block], rows_VH))
                    assert weights_BV is not None
                    tile.accumulate(gradient_NH[block], weights_BV, rows_VH)

    return milliseconds(run)


def loss_cases() -> list[dict[str, Any]]:
    """Errors first, then times for tile sizes."""
    results: list[dict[str, Any]] = []
    for hidden in (3072, 4096):
        errors = loss_errors(1000, hidden)
        pairs = zip(errors["triton"], errors["reference"], strict=True)
        right = all(ours <= ALLOWED_ERROR_RATIO * plain for ours, plain in pairs)
        results.append({"kernel": "loss", "hidden": hidden, "errors": errors, "right": right})
        if not right:
            continue
        for tokens in (512, 3584, 4096, 14336):
            results.extend(loss_times(tokens, hidden))
    return results


def loss_times(tokens: int, hidden: int) -> list[dict[str, Any]]:
    """Plain torch once; the kernels with several tiles."""
    hidden_NH, head, targets_N = loss_problem(tokens, hidden)
    counted = int((targets_N != IGNORED).sum())

    def call(impl: str) -> Callable[[], object]:
        return lambda: head_cross_entropy(hidden_NH, head, targets_N, counted=counted, impl=impl)  # type: ignore[arg-type]

    results: list[dict[str, Any]] = []
    shapes = {(min(tokens, t), w) for t in (4096, 7168, 14336) for w in (128, 256, 512)}
    before = dict(loss_tile.TILE_TOKENS), dict(loss_tile.TILE_BYTES)
    common = {"kernel": "loss", "hidden": hidden, "tokens": tokens}
    for tile_tokens, workspace in sorted(shapes):
        loss_tile.TILE_TOKENS["cuda"], loss_tile.TILE_BYTES["cuda"] = tile_tokens, workspace * MIB
        tile = Tile.of(LossShape.of(hidden_NH, head), counted)
        times = {"triton_ms": milliseconds(call("triton")), "products_ms": products_alone(hidden_NH, head)}
        if (tile_tokens, workspace) == (min(tokens, 4096), 256):
            times |= {"torch_ms": milliseconds(call("torch"))}
            with torch.no_grad():
                times |= {"evaluation_triton_ms": milliseconds(call("triton"))}
                times |= {"evaluation_torch_ms": milliseconds(call("torch"))}
        share = round(times["products_ms"] / times["triton_ms"], 3)
        rate = round(4 * tokens * hidden * VOCAB / times["products_ms"] / 1e9)
        facts = {"workspace_mib": workspace, "tile": [tile.tokens, tile.columns], "products_tflops": rate}
        results.append(common | facts | times | {"share_of_products": share})
        print(json.dumps(results[-1]), flush=True)
    loss_tile.TILE_TOKENS.update(before[0])
    loss_tile.TILE_BYTES.update(before[1])
    return results


def fp8_cases() -> list[dict[str, Any]]:
    """Milliseconds of the products of 3B and 8B layers."""
    from drawplate.kernels.fp8_rows import FP8, fp8_rows

    rounding = torch.compile(fp8_rows, dynamic=False)
    one = torch.ones((), device="cuda")
    results: list[dict[str, Any]] = []
    for out, inner in ((3072, 3072), (1024, 3072), (8192, 3072), (3072, 8192), (14336, 4096), (4096, 14336)):
        for tokens in (3584, 14336):
            x_NI = torch.randn(tokens, inner, device="cuda").bfloat16()
            weight_OI = torch.randn(out, inner, device="cuda").mul_(0.02).bfloat16()
            x8, x_scale = fp8_rows(x_NI)
            weight8, weight_scale = fp8_rows(weight_OI)
            options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
            by_row = {**options, "scale_a": x_scale, "scale_b": weight_scale.t().contiguous()}
            by_tensor = {**options, "scale_a": one, "scale_b": one}
            slow = {**by_row, "use_fast_accum": False}
            exact = (x8[:256].float() @ weight8.float().t()) * x_scale[:256] * weight_scale.t()
            errors = {
                f"{name}_error": relative(
                    torch._scaled_mm(x8[:256], weight8.t(), **{**s, "scale_a": x_scale[:256]}), exact
                )
                for name, s in (("fast", by_row), ("slow", slow))
            }
            times = {
                "bf16_ms": milliseconds(lambda x=x_NI, w=weight_OI: x @ w.t()),
                "slow_ms": milliseconds(lambda x=x8, w=weight8, s=slow: torch._scaled_mm(x, w.t(), **s)),
                "fp8_rows_ms": milliseconds(lambda x=x8, w=weight8, s=by_row: torch._scaled_mm(x, w.t(), **s)),
                "fp8_tensor_ms": milliseconds(lambda x=x8, w=weight8, s=by_tensor: torch._scaled_mm(x, w.t(), **s)),
                "rounding_ms": milliseconds(lambda x=x_NI: rounding(x)),
                "transpose_ms": milliseconds(lambda w=weight8: w.view(torch.uint8).t().contiguous().view(FP8)),
            }
            results.append(
                {"kernel": "fp8", "out_features": out, "in_features": inner, "tokens": tokens, **times, **errors}
            )
            print(json.dumps(results[-1]), flush=True)
    return results


def four_bits_cases() -> list[dict[str, Any]]:
    """Milliseconds and weights per second of dequantizing a large matrix of a 3B and an 8B."""
    from drawplate.kernels.four_bits import dequantize
    from drawplate.model.base.precision import Storage

    results: list[dict[str, Any]] = []
    for shape in ((8192, 3072), (14336, 4096)):
        storage = Storage("nf4")
        encoded = storage.encode(torch.randn(shape, device="cuda").bfloat16())
        stored = [encoded[name] for name in storage.specs(*shape)]
        spent = milliseconds(lambda s=stored, o=shape: dequantize(s, "nf4", o, torch.bfloat16))
        rate = round(shape[0] * shape[1] / spent / 1e6, 1)
        results.append({"kernel": "four_bits", "shape": shape, "triton_ms": spent, "weights_per_nanosecond": rate})
        print(json.dumps(results[-1]), flush=True)
    return results


CASES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "loss": loss_cases,
    "fp8": fp8_cases,
    "four_bits": four_bits_cases,
}


def main() -> None:
    """Run the named kernels' cases and write one JSON file."""
    from bench.streaming import record

    results = []
    for name in sys.argv[2:] or CASES:
        results.extend(CASES[name]())
        Path(sys.argv[1]).write_text(json.dumps(record(results), indent=1))


if __name__ == "__main__":
    main()
