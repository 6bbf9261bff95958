"""The real shapes of open models, with random weights: what speed and memory depend on, without a download."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

LLAMA3 = {"vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "tie_word_embeddings": True,
    },
    "1b": LLAMA3
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
    "3b": LLAMA3
    | {
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
    "8b": LLAMA3
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "tie_word_embeddings": False,
    },
    "70b": LLAMA3
    | {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "tie_word_embeddings": False,
    },
}


def shape_config(name: str, *, layers: int | None = None) -> PretrainedConfig:
    """A Llama configuration of that size; `layers` cuts it short."""
    values = SHAPES[name] | ({"num_hidden_layers": layers} if layers else {})
    return AutoConfig.for_model(
        "llama",
        architectures=["LlamaForCausalLM"],
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        **values,
    )


class _AnyName:
    """Holds every tensor name but those of pre-quantized checkpoints."""

    def __contains__(self, name: str) -> bool:
        return not name.endswith(".SCB")

    def __iter__(self) -> Any:
        return iter(())


@dataclass
class RandomCheckpoint:
    """Stands in for a Checkpoint: every tensor is drawn when it is read, on the device that quantizes it."""

    config: PretrainedConfig
    shapes: dict[str, tuple[int, ...]]
    device: str = "cuda"
    name: str = "random"
    folder: Path = Path(".")
    revision: str | None = None
    files: Any = field(default_factory=_AnyName)
    quantized_precision: str | None = None
    remarks: tuple[str, ...] = ()
    fingerprint: str = ""

    def read(self, name: str) -> Tensor:
        """Normal weights of a trained model's scale; norms near one."""
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=self.device)
        if "embed" in name or "lm_head" in name:  # on the host, where a checkpoint's are; few rows, again and again
            rows = torch.empty(min(1024, shape[0]), shape[1], dtype=torch.bfloat16).normal_(0, 0.02)
            return rows.repeat(-(-shape[0] // len(rows)), 1)[: shape[0]].contiguous()
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(0, 0.02)

    def stored_linear(self, name: str, storage: Any) -> None:
        """Nothing is quantized beforehand."""
        return

    def sha256(self) -> str:
        """Random weights have no fingerprint, unless one is given so that their prepared form is kept."""
        return self.fingerprint


def random_checkpoint(name: str, *, layers: int | None = None, device: str = "cuda") -> RandomCheckpoint:
    """A checkpoint of one of the shapes."""
    from drawplate.model.layer.anatomy import build_anatomy

    config = shape_config(name, layers=layers)
    anatomy = build_anatomy(config)
    shapes = {path: tuple(p.shape) for path, p in anatomy.skeleton.named_parameters()}
    return RandomCheckpoint(config=config, shapes=shapes, device=device)
