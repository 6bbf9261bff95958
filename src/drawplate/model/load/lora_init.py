"""An adapter that starts from what quantizing the base model has lost, instead of from zero.

For each target the error W - Q(W) is known while the unquantized weights are at hand. Its best approximation of the
adapter's rank, weighed by the root mean square of each of the layer's inputs over some training text, is where A and B
start: Q(W) + scaling B A then gives nearly what W gave (the approximate form of QERA, Zhang et al. 2024,
arXiv:2410.06040; unweighed it is the first step of LoftQ, Li et al. 2023, arXiv:2310.08659).

Such an adapter belongs to the quantized weights: on others it would add the error a second time. `without_start` gives
the one for those: the difference to the start, as PEFT does for PiSSA and LoftQ, in twice the rank.

Left out: weighing by the inputs' whole covariance (QERA's exact form), which would need its square root for each layer;
quantizing anew after subtracting B A (LoftQ's further steps), after which the base would be nobody else's NF4.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from peft import LoraConfig
from torch import Tensor

from drawplate.data.batches import Batch
from drawplate.model.base.adapter_config import scaling_of
from drawplate.model.base.precision import Storage
from drawplate.model.causal_lm import CausalLM
from drawplate.model.layer.frozen_linear import FrozenLinear

OVERSAMPLED = 8
ITERATIONS = 3
LEAST_WEIGHT = 1e-3
Start = dict[str, Tensor]
"""Tensors of an adapter by PEFT's names, in host memory."""


@torch.no_grad()
def quantization_error_start(
    model: CausalLM, storage: Storage, batches: Iterable[Batch], config: LoraConfig, *, seed: int
) -> Start:
    """A and B of every target, as the adapter of `config` is to start on weights kept in `storage`.

    Args:
        model: the unquantized base model, with an adapter on the same targets that changes nothing.
        storage: of the weights to be trained on.
        batches: training text whose activations weigh the error.
        config: rank and scaling of the adapter.
        seed: of the search for the leading directions.
    """
    rms = _input_rms(model, batches)
    generator = torch.Generator().manual_seed(seed)
    root = math.sqrt(scaling_of(config))
    found: Start = {}
    for i, template in enumerate(model.runner.templates):
        tensors = model.residency.acquire(i)
        for path, linear in _targets(template):
            error_OI = _error(tensors[f"{path}.weight"], storage)
            rms_I = rms[i, path]
            weight_I = rms_I.clamp(min=LEAST_WEIGHT * float(rms_I.max()))
            left_OR, right_RI = leading_factors(error_OI.mul_(weight_I), config.r, generator)
            prefix = f"base_model.model.{model.anatomy.home.layers_path}.{i}.{path}"
            a_RI = torch.zeros(config.r, linear.in_features)
            b_OR = torch.zeros(linear.out_features, config.r)
            a_RI[: len(right_RI)] = (right_RI / weight_I / root).cpu()
            b_OR[:, : len(right_RI)] = (left_OR / root).cpu()
            found[f"{prefix}.lora_A.weight"], found[f"{prefix}.lora_B.weight"] = a_RI, b_OR
        model.residency.release(i)
    return found


def leading_factors(matrix_OI: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(O, R) and (R, I), whose product is nearly the matrix's best approximation of rank R; R at most O and I.

    By subspace iteration from random directions (Halko, Martinsson and Tropp 2011); each singular value is shared
    evenly between the two.
    """
    width = min(rank + OVERSAMPLED, *matrix_OI.shape)
    start_IW = torch.randn(matrix_OI.shape[1], width, generator=generator).to(matrix_OI)
    basis_OW = torch.linalg.qr(matrix_OI @ start_IW).Q
    for _ in range(ITERATIONS):
        basis_OW = torch.linalg.qr(matrix_OI @ torch.linalg.qr(matrix_OI.T @ basis_OW).Q).Q
    u_WW, s_W, v_WI = torch.linalg.svd(basis_OW.T @ matrix_OI, full_matrices=False)
    root_R = s_W[:rank].sqrt()
    return basis_OW @ u_WW[:, :rank] * root_R, root_R[:, None] * v_WI[:rank]


def without_start(config: LoraConfig, state: Start, start: Start) -> tuple[LoraConfig, Start]:
    """The adapter that adds what `state` adds, less what `start` did: for a base that was not quantized.

    Its rank is doubled, [A; A0] and [B, -B0], and its alpha such that the scaling stays.
    """
    doubled = copy.deepcopy(config)
    doubled.r = 2 * config.r
    alpha = config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2)
    doubled.lora_alpha = alpha if alpha % 1 else int(alpha)  # type: ignore[assignment]
    joined = dict(state)
    for name, tensor in start.items():
        is_a = name.endswith("lora_A.weight")
        joined[name] = torch.cat([state[name], tensor if is_a else -tensor], dim=0 if is_a else 1).contiguous()
    return doubled, joined


def _error(weight_OI: Tensor, storage: Storage) -> Tensor:
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    encoded = storage.encode(weight_OI)
    stored_OI = storage.decode([encoded[name] for name in storage.specs(*shape)], shape, weight_OI.dtype)
    return weight_OI.float().sub_(stored_OI)


def _targets(template: torch.nn.Module) -> list[tuple[str, FrozenLinear]]:
    return [(path, m) for path, m in template.named_modules() if isinstance(m, FrozenLinear) and m.rank]


def _input_rms(model: CausalLM, batches: Iterable[Batch]) -> dict[tuple[int, str], Tensor]:
    """(layer, path of a target) -> root mean square of each of its inputs, over tokens that are no padding."""
    sums: dict[tuple[int, str], Tensor] = {}
    real_N = torch.empty(0)
    tokens = 0

    def watch(key: tuple[int, str]) -> torch.utils.hooks.RemovableHandle:
        def look(_: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
            x_NI = given[0].flatten(0, -2).float()
            x_NI = x_NI * real_N[: len(x_NI), None]
            sums[key] = sums.get(key, 0.0) + x_NI.square_().sum(0)

        return dict(_targets(model.runner.templates[key[0]]))[key[1]].register_forward_pre_hook(look)

    keys = [(i, path) for i, template in enumerate(model.runner.templates) for path, _ in _targets(template)]
    handles = [watch(key) for key in keys]
    try:
        for batch in batches:
            real_BT = torch.as_tensor(batch.sequence_ids_BT) >= 0
            width = model.placed(batch, None).ids_BT.shape[1]  # on a GPU rows are padded further
            padded_BT = torch.nn.functional.pad(real_BT, (0, width - real_BT.shape[1]))
            real_N = padded_BT.reshape(-1).to(model.placement.device, torch.float32)
            tokens += int(real_BT.sum())
            model.hidden_states(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {key: (total / tokens).sqrt() for key, total in sums.items()}
