"""What every system is given: a checkpoint of random weights, a tokenizer, and the adapter's initial values.

Made once per machine, from fixed seeds, on the GPU where there is one; a few seconds and 2 bytes a parameter of disk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.shapes import shape_config

SHARD_BYTES = 2 * 2**30
RANK, ALPHA, TARGETS = 8, 32, ("q_proj", "v_proj")
START = "start.safetensors"
WORDS = 1000


def make_material(folder: Path, shape: str, layers: int | None) -> None:
    """Checkpoint, tokenizer and adapter start in `folder`; nothing where they are there already."""
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "made.json"
    wanted = json.dumps({"shape": shape, "layers": layers})
    if done.is_file() and done.read_text() == wanted:
        return
    config = shape_config(shape, layers=layers)
    config.save_pretrained(folder)
    _save_weights(folder, config)
    _save_tokenizer(folder)
    save_file(initial_adapter(config), folder / START)
    done.write_text(wanted)


def _save_weights(folder: Path, config: Any) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shapes = {
            name: p.shape
            for name, p in AutoModelForCausalLM.from_config(config).named_parameters(remove_duplicate=True)
        }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(11)
    shards: list[dict[str, Tensor]] = [{}]
    held_bytes = 0
    for name, shape in shapes.items():
        if len(shape) == 1:
            tensor = torch.ones(shape, dtype=torch.bfloat16)
        else:
            tensor = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator).cpu()
        if held_bytes + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            held_bytes = 0
        shards[-1][name] = tensor
        held_bytes += tensor.nbytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    total = sum(t.nbytes for shard in shards for t in shard.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", *(f"w{i}" for i in range(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def initial_adapter(config: Any) -> dict[str, Tensor]:
    """PEFT's names -> fp32 values, as PEFT draws them: A uniform in +-1/sqrt(inputs) (Kaiming, a = sqrt(5)), B zero."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    outputs = {"q_proj": config.num_attention_heads * head_dim, "v_proj": config.num_key_value_heads * head_dim}
    generator, bound = torch.Generator().manual_seed(13), config.hidden_size**-0.5
    start = {}
    for layer in range(config.num_hidden_layers):
        for target in TARGETS:
            path = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            a = torch.empty(RANK, config.hidden_size).uniform_(-bound, bound, generator=generator)
            start[f"{path}.lora_A.weight"] = a
            start[f"{path}.lora_B.weight"] = torch.zeros(outputs[target], RANK)
    return start


def load_start(folder: Path) -> dict[str, Tensor]:
    """The adapter's initial values."""
    return load_file(folder / START)
