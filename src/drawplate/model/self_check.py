"""The executor's loss on one short text against transformers' own, with the same stored weights.

The reference is transformers' untouched module with its own attention and its own loss, holding the weights as they are
stored (dequantized): the difference shows a fault in layers, attention, residency, adapter or loss, and nothing else.
A run is refused where it is far beyond what rounding explains, and warned of where it is beyond it at all.
Left out: models whose dequantized weights would take more than `LARGEST_BYTES`; `model/support.py` and
`model/logits_path.py` look at those too, without data.
"""

from __future__ import annotations

import math

import torch

from drawplate.data.batches import Batch
from drawplate.errors import NumericError
from drawplate.model.anatomy import build_anatomy
from drawplate.model.causal_lm import CausalLM
from drawplate.model.frozen import FrozenLinear
from drawplate.units import GIB

LARGEST_BYTES = GIB
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Relative differences that the rounding of a compute dtype explains, with room."""
REFUSED_TIMES = 5
"""Beyond this many tolerances it is another model that would be trained."""


def self_check(model: CausalLM, batch: Batch) -> float | None:
    """Relative difference of the loss on one padded sequence; None where the model is too large to be held twice.

    Args:
        model: freshly assembled: the adapter must still be zero.
        batch: one row, in host memory.

    Returns:
        Infinity where only the executor's loss is not a number, NaN where transformers' own is none.
    """
    dtype = model.placement.compute_dtype
    if model.anatomy.parameters * dtype.itemsize > LARGEST_BYTES or batch.counted_tokens == 0:
        return None
    with torch.no_grad():
        ours = float(model.sum_nats(batch)[0])
        reference = _reference_module(model)
        device = model.placement.device
        logits = reference(input_ids=batch.input_ids_BT.to(device), use_cache=False).logits.float()
        targets = batch.targets_BT.to(device)
        theirs = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    if math.isfinite(theirs) and not math.isfinite(ours):
        return math.inf
    return abs(ours - theirs) / abs(theirs)


def warning_of(model: CausalLM, difference: float | None) -> str:
    """What is to be said of a difference; empty where rounding explains it or nothing was compared.

    Raises:
        NumericError: it is so large that training would be of another model.
    """
    tolerance = TOLERANCE[model.placement.compute_dtype]
    if difference is None or difference <= tolerance:
        return ""
    by = f"the loss on a short text differs from transformers' own by {100 * difference:.3g} %"
    if difference > REFUSED_TIMES * tolerance:
        anatomy = model.anatomy
        raise NumericError(
            f"Self-check: {by}, where rounding explains {100 * tolerance:.3g} %: {anatomy.architecture} (model type "
            f"{anatomy.config.model_type}) is not carried out as it should be, and would be trained wrongly.",
            safe="Nothing was trained.",
            next_step="Choose another base model, such as Llama, Mistral, Qwen, Gemma, Phi, SmolLM or OLMo.",
        )
    return f"Self-check: {by}. Results may not carry over to other programs."


def _reference_module(model: CausalLM) -> torch.nn.Module:
    """transformers' own module with the stored weights, on the model's device."""
    own, dtype, device = model.anatomy, model.placement.compute_dtype, model.placement.device
    fresh = build_anatomy(own.config, attention="eager")
    state: dict[str, torch.Tensor] = {}
    for i, layer in enumerate(model.runner.templates):
        stored = {name: tensor.to(device) for name, tensor in model.residency.stored(i).items()}
        for path, module in layer.named_modules():
            if isinstance(module, FrozenLinear):
                parts = [stored.pop(f"{path}.{name}") for name in module.stored_names]
                shape = (module.out_features, module.in_features)
                stored[f"{path}.weight"] = module.storage.decode(parts, shape, dtype)
        state |= {f"{own.layers_path}.{i}.{name}": tensor for name, tensor in stored.items()}
    outside = {**dict(own.skeleton.named_parameters()), **dict(own.skeleton.named_buffers())}
    state |= {name: t.detach().to(device) for name, t in outside.items() if not t.is_meta}
    head = model.head.weights
    state[f"{own.head_path}.weight"] = torch.cat([rows.clone() for _, rows in head.chunks()])
    if model.head.bias is not None:
        state[f"{own.head_path}.bias"] = model.head.bias
    for name, tensor in state.items():
        _set(fresh.skeleton, name, tensor)
    return fresh.skeleton.eval()


def _set(root: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = root.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor
