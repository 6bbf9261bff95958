"""transformers + PEFT: the fp32 reference, the mission's own stack (bitsandbytes NF4), Liger on top.

The mission's recipe as written: NF4 with double quantization, fp16 arithmetic, `prepare_model_for_kbit_training`,
gradient checkpointing, LoRA r=8, alpha 32 on q and v with dropout 0.1. transformers' Trainer is left out: its loop
would only add to the time.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.peers.cases import Setting
from bench.peers.material import load_lora
from bench.peers.stepping import Documents, Scale, padded

PAD_MULTIPLE = 16
LOSS_ROWS = 512


class PeftPeer:
    """A PEFT model called under autocast; `Peer` of stepping.py."""

    packs = False

    def __init__(self, model: Any, device: torch.device, compute: torch.dtype) -> None:
        self.model, self.device, self.compute = model, device, compute
        self.fp16 = compute == torch.float16
        self.adapter = peft_tensors(model)
        self._dropouts = [
            m for name, m in model.named_modules() if "lora_dropout" in name and isinstance(m, nn.Dropout)
        ]

    def zero_gradients(self) -> None:
        """Before the first micro-batch of a step."""
        for parameter in self.adapter.values():
            parameter.grad = None

    def backward(
        self, documents: Documents, share: float, *, dropout: float, packed_tokens: int, scale: Scale
    ) -> Tensor:
        """As in Peer.

        Raises:
            ValueError: rows packed, which plain transformers models do not keep apart; or a dropout the model lacks.
        """
        if packed_tokens and not self.packs:
            raise ValueError("does not pack documents")
        if dropout and not self._dropouts:
            raise ValueError("was loaded without dropout")
        for module in self._dropouts:
            module.p = dropout
        with self._autocast():
            loss = self.loss(padded(documents, PAD_MULTIPLE, self.device))
        (loss * share * scale).backward()
        return loss.detach()

    def loss(self, inputs: dict[str, Tensor]) -> Tensor:
        """Mean nats of the counted tokens, by the model itself."""
        return self.model(**inputs, use_cache=False).loss

    def _autocast(self) -> Any:
        if self.compute == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.compute)


class Fp32Reference(PeftPeer):
    """Everything in fp32 (no TF32), the loss in slices of rows so that a card of 80 GB holds it.

    Packed documents get a row each: the same function, which is what a yardstick is for.
    """

    packs = True

    def loss(self, inputs: dict[str, Tensor]) -> Tensor:
        """As the model's own, without all logits at once."""
        base = self.model.get_base_model()
        mask = inputs.get("attention_mask")
        hidden = base.model(input_ids=inputs["input_ids"], attention_mask=mask, use_cache=False).last_hidden_state
        targets = inputs["labels"][:, 1:].reshape(-1)
        rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        total = torch.zeros((), device=self.device)
        for h, t in zip(rows.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True):
            total = total + checkpoint(_sum_nats, h, base.lm_head.weight, t, use_reentrant=False)
        return total / (targets != -100).sum()


def _sum_nats(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(hidden @ head.T, targets, reduction="sum")


def load(folder: Path, setting: Setting) -> PeftPeer:
    """The reference, the mission's own stack, or the latter with Liger."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    reference = setting.system == "reference"
    compute = torch.float32 if reference else getattr(torch, setting.options.get("compute", "bfloat16"))
    quantized, checkpointing = setting.options.get("bits", 4) == 4, setting.options.get("checkpointing", True)
    if setting.system == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    if compute == torch.float32:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": device})
        quantized = False
    elif quantized:
        base = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=nf4(compute), dtype=compute, device_map={"": device}
        )
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing)
    else:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=compute, device_map={"": device})
    lora = LoraConfig(**load_lora(folder), lora_dropout=setting.dropout, bias="none", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    if not quantized and checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    return (Fp32Reference if reference else PeftPeer)(model, device, compute)


def nf4(compute: torch.dtype) -> Any:
    """The mission's quantization."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def peft_tensors(model: Any) -> dict[str, nn.Parameter]:
    """The trained tensors under the names PEFT saves them by."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {name.replace(".default.", ".").replace("._orig_mod.", "."): p for name, p in trained.items()}
