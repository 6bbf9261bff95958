"""Loss and gradient of two short texts as the plan computes them, against transformers' own, before training begins.

The reference is transformers' untouched module in float32 with the stored weights, its attention, its loss and torch's
autograd (model/load/twin.py): the difference shows a fault in layers, attention, residency, recomputation, adapter or
loss, and nothing else but rounding. Rounding hides much in bf16 and more in fp8; so there, and where the reference has
no room, the plan's gradient is also compared with that of the same layers on the same texts with their activations
kept, where rounding is the same.

The adapter's B is random meanwhile: where it is zero A has no gradient, and nobody would see a wrong scale. Its values
are put back. A run is refused where a difference is far beyond what rounding explains, or where a trained tensor gets
no gradient; it is warned of where one is beyond rounding at all.

Left out: dropout; compiled layers and captured micro-steps, which would cost seconds for a shape that is never used
again (bench and tests compare those); texts longer than this one.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from drawplate.data.batches import Batch, cut_packed, cut_padded
from drawplate.errors import NumericError, UserError
from drawplate.model.base.precision import FP8_KINDS
from drawplate.model.causal_lm import CausalLM
from drawplate.model.layer.frozen_linear import FrozenLinear
from drawplate.model.load.twin import HEAD_ROWS, Twin
from drawplate.records import SelfCheck
from drawplate.records import Sequence as Tokens

LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Relative differences that the rounding of a compute dtype explains, with room."""
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 5e-2}
"""The same for the norm of the gradients' difference: measured 3e-6, 0.06 and 0.01 on 4 and 30 random layers."""
FP8_TOLERANCES = 2e-2, 0.6
"""Loss and gradient where products round both operands to fp8: 0.003 and 0.36 were measured."""
KEPT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""For gradients of the same layers with other policies: equal on a CPU; on a GPU some sums have no fixed order."""
REFUSED_TIMES = 5
"""Beyond this many tolerances it is another model that would be trained."""
REFUSED_GRADIENT = 0.5, 0.9
"""No gradient further off than this, or this in fp8, is trained with, whatever REFUSED_TIMES says."""
NEGLIGIBLE = 1e-4
"""Share of the whole gradient's norm below which a tensor's own may vanish."""
MISSING = 1e-2
"""Share of its norm below which a tensor's gradient counts as missing."""
RANDOM_PRODUCT = 0.1
"""Size of what the random B adds to a layer's output, where its input has size 1."""


def self_check(model: CausalLM, texts: Sequence[Tokens], *, packed: bool, room_bytes: int | None = None) -> SelfCheck:
    """Compare; never runs out of memory.

    Args:
        model: assembled, its gradients not in use.
        texts: short ones, as different in length as may be.
        packed: whether the plan packs: then they share a row.
        room_bytes: of the device, which the check may take; None where that is not known.
    """
    packed = packed and not model.unpackable
    while (needed := check_bytes(model, texts)) > (needed if room_bytes is None else room_bytes):
        texts = [_shortened(text, len(text) // 2) for text in texts]
        if max(len(text) for text in texts) < 4:
            return SelfCheck(packed=packed, left_out="the device has no room for it beside what the plan needs")
    rows = cut_padded(texts, len(texts), 1, 0)[0]
    planned = cut_packed(texts, rows.tokens, 1, 0)[0] if packed else rows
    found = SelfCheck(packed=packed, tokens=rows.tokens)
    if rows.counted_tokens == 0:
        return replace(found, left_out="the loss counts no token of the short texts")
    try:
        with _random_adapter(model):
            return _compared(model, rows, planned, found)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        return replace(found, left_out="the device ran out of memory")
    finally:
        _let_go(model)


def warnings_of(model: CausalLM, check: SelfCheck) -> list[str]:
    """What is to be said of a check that found something, or was left out.

    Raises:
        NumericError: a difference is so large that training would be of another model.
    """
    dtype, fp8 = model.placement.compute_dtype, model.placement.storage.precision in FP8_KINDS
    loss, gradient = FP8_TOLERANCES if fp8 else (LOSS_TOLERANCE[dtype], GRADIENT_TOLERANCE[dtype])
    kept = KEPT_TOLERANCE[dtype]
    limit = min(REFUSED_TIMES * gradient, REFUSED_GRADIENT[fp8])
    own, same = "transformers' own", "that of the same layers with their activations kept"
    said = []
    for what, difference, tolerance, refused in (
        (f"the loss on a short text differs from {own}", check.loss_difference, loss, REFUSED_TIMES * loss),
        (f"the adapter's gradient differs from {own}", check.gradient_difference, gradient, limit),
        (f"the adapter's gradient differs from {same}", check.kept_difference, kept, REFUSED_TIMES * kept),
    ):
        if difference is None or difference <= tolerance:
            continue
        by = f"{what} by {100 * difference:.3g} %" + (f", most in {check.tensor}" if "gradient" in what else "")
        if difference > refused:
            raise _refusal(model, f"{by}, where rounding explains {100 * tolerance:.3g} %")
        said.append(f"Self-check: {by}. Results may not carry over to other programs.")
    if check.missing:
        raise _refusal(model, f"{len(check.missing)} trained tensors get no gradient, the first {check.missing[0]}")
    if check.left_out:
        said.append(f"The self-check of loss and gradient was left out in part or whole: {check.left_out}.")
    return said


def in_words(check: SelfCheck) -> str:
    """What was compared and how far it is off; empty where nothing was."""
    parts = [
        f"{name} {difference:.2g} off {reference}"
        for name, difference, reference in (
            ("loss", check.loss_difference, "transformers' own"),
            ("gradient", check.gradient_difference, "transformers' own"),
            ("gradient", check.kept_difference, "the one with activations kept"),
        )
        if difference is not None
    ]
    how = f"{check.tokens} tokens, {'packed' if check.packed else 'padded'}"
    return f"Self-check ({how}): {', '.join(parts)}." if parts else ""


def check_bytes(model: CausalLM, texts: Sequence[Tokens]) -> int:
    """What the check takes on the device, about: a layer in float32, its stored bytes and one weight on its way, the
    activations of all layers in float32, the logits three times, and some rows of the head."""
    config, templates = model.anatomy.config, model.runner.templates
    width = max(len(text) for text in texts)
    tokens = width * len(texts)
    linears = [
        [(m.in_features, m.out_features) for m in layer.modules() if isinstance(m, FrozenLinear)] for layer in templates
    ]
    largest = max((sum(i * o for i, o in layer) for layer in linears), default=0)
    one = max((i * o for layer in linears for i, o in layer), default=0)
    heads = getattr(config, "num_attention_heads", None) or 1
    kept = sum(tokens * (8 * config.hidden_size + 2 * sum(o for _, o in layer)) for layer in linears)
    scores = 3 * len(texts) * heads * width * width * len(templates)
    logits = 3 * tokens * model.head.vocab
    head = min(HEAD_ROWS, model.head.vocab) * config.hidden_size
    stored = max(layout.bytes for layout in model.residency.layouts)
    return 4 * (largest + 2 * one + kept + scores + logits + head) + stored


def _compared(model: CausalLM, rows: Batch, planned: Batch, found: SelfCheck) -> SelfCheck:
    nats, ours = _gradients(model, planned)
    if model.placement.compute_dtype == torch.float16 and math.isfinite(nats) and not _finite(ours):
        return replace(found, left_out="a gradient of the short texts overflows fp16 without a smaller loss scale")
    try:
        reference, theirs = Twin(model).gradients(rows.input_ids_BT, rows.targets_BT)
    except UserError:
        raise
    except Exception as error:  # whatever an architecture's own code may raise
        memory = isinstance(error, RuntimeError) and _is_out_of_memory(error)
        why = "the device has no room for transformers' own layers" if memory else f"transformers' own module: {error}"
        found = replace(found, left_out=why.partition("\n")[0])
    else:
        with torch.no_grad():
            padded = nats if planned is rows else float(model.sum_nats(rows)[0])
        found = replace(found, loss_difference=max(_relative(n, reference) for n in (nats, padded)))
        found = _gradients_compared(model, found, ours, theirs)
        found = replace(found, gradient_difference=_difference(ours, theirs))
        del theirs
    if _is_moved(model) and (found.gradient_difference is None or _rounds(model)):
        _, kept = _gradients(model, planned, policy="keep")
        if found.gradient_difference is None:
            found = _gradients_compared(model, found, ours, kept)
        found = replace(found, kept_difference=_difference(ours, kept))
    return found


def _gradients(model: CausalLM, batch: Batch, policy: str = "") -> tuple[float, list[Tensor]]:
    """(nats, each trained tensor's gradient in float32) as planned, but uncompiled; or with one policy for all."""
    model.adapter.zero_gradients()
    with torch.enable_grad(), model.runner.uncompiled(policy):
        loss, _ = model.sum_nats(batch)
        loss.backward()
    device, parameters = model.placement.device, model.adapter.parameters()
    zeros = (torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
    gradients = [gradient.detach().to(device).float().clone() for gradient in zeros]
    model.adapter.drop_gradients()
    return float(loss.detach()), gradients


def _gradients_compared(
    model: CausalLM, found: SelfCheck, ours: Sequence[Tensor], theirs: Sequence[Tensor]
) -> SelfCheck:
    """With the tensor that differs most in its own measure, and those that get no gradient."""
    names, whole = list(model.adapter.named_tensors()), float(_norm(theirs))
    missing, worst = [], ("", 0.0)
    for name, own, reference in zip(names, ours, theirs, strict=True):
        norm = float(reference.norm())
        if not norm > NEGLIGIBLE * whole:
            continue
        if float(own.norm()) < MISSING * norm:
            missing.append(name)
        worst = max(worst, (name, float((own - reference).norm()) / norm), key=lambda each: each[1])
    return replace(found, tensor=worst[0], tensor_difference=worst[1], missing=tuple(missing))


def _difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Norm of the difference over the reference's norm; infinity where only ours is not a number."""
    if _finite(theirs) and not _finite(ours):
        return math.inf
    whole = float(_norm(theirs))
    return float(_norm([a - b for a, b in zip(ours, theirs, strict=True)])) / whole if whole else 0.0


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


def _finite(tensors: Sequence[Tensor]) -> bool:
    return bool(torch.isfinite(_norm(tensors)))


def _relative(ours: float, theirs: float) -> float:
    """NaN where transformers' own is none, infinity where only ours is none."""
    if math.isfinite(theirs) and not math.isfinite(ours):
        return math.inf
    return abs(ours - theirs) / abs(theirs)


def _rounds(model: CausalLM) -> bool:
    return model.placement.compute_dtype != torch.float32 or model.placement.storage.precision in FP8_KINDS


def _is_moved(model: CausalLM) -> bool:
    """Whether anything is recomputed or sent to host memory and back."""
    return any(policy != "keep" for policy in model.runner.policies)


@contextmanager
def _random_adapter(model: CausalLM) -> Iterator[None]:
    """Every B random for a while; afterwards all bytes are as before."""
    config = model.adapter.config
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    size = RANDOM_PRODUCT / (max(abs(scaling), 1e-6) * math.sqrt(config.r))
    generator = torch.Generator().manual_seed(0)
    named = {n: p for n, p in model.adapter.named_tensors().items() if ".lora_B." in n}
    before = {name: p.detach().clone() for name, p in named.items()}
    with torch.no_grad():
        for p in named.values():
            p.copy_(torch.randn(p.shape, generator=generator).mul_(size))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(before[name])


def _let_go(model: CausalLM) -> None:
    model.adapter.drop_gradients()
    model.runner.begin(None)
    if model.placement.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _shortened(text: Tokens, length: int) -> Tokens:
    return replace(text, input_ids=text.input_ids[:length], counted=text.counted[:length])


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "memory" in str(error)


def _refusal(model: CausalLM, what: str) -> NumericError:
    anatomy = model.anatomy
    return NumericError(
        f"Self-check: {what}: {anatomy.architecture} (model type {anatomy.config.model_type}) is not carried out as it "
        "should be, and would be trained wrongly.",
        safe="Nothing was trained.",
        next_step="Choose another base model, such as Llama, Mistral, Qwen, Gemma, Phi, SmolLM or OLMo.",
    )
