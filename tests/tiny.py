"""A whole run in about a second: a random Llama of two layers, a throwaway tokenizer and a folder of small texts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from drawplate.model.base.precision import Storage
from drawplate.model.base.weights import Checkpoint, open_checkpoint
from drawplate.model.causal_lm import CausalLM
from drawplate.model.load.assemble import assemble
from drawplate.model.placement import Placement
from drawplate.model.support.targets import lora_config
from drawplate.recipe import LoraSection, ModelSection, Recipe, load_recipe
from drawplate.run.journal import Journal

WORDS = (  # noqa: SIM905
    "the a rising sea level ice melts warm water climate heat carbon ocean air rain drought forest fire wind sun cloud "
    "report shows that and of in on over since by many coasts people land crops grow less more each year"
).split()
LAYERS = 2


def a_weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Random, as a weight matrix is."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).mul_(0.05).to(dtype)


def texts(count: int, seed: int = 0) -> list[str]:
    """Sentences of a tiny language, all different, of 5 to 40 words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(5, 40))) + f" {i}." for i in range(count)]


def write_texts(folder: Path, count: int = 24, seed: int = 0) -> Path:
    """One .txt file a document."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts(count, seed)):
        (folder / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    return folder


def write_tokenizer(folder: Path) -> int:
    """A byte-level BPE trained on the tiny language; returns the size of its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(50), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )
    fast.save_pretrained(folder)
    return len(fast)


def write_base(
    folder: Path, *, architecture: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A model folder: config, random weights in safetensors, tokenizer."""
    vocab = write_tokenizer(folder)
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(7)
    config = AutoConfig.for_model(architecture, **{**settings, **changes})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def recipe_values(base: Path, files: Path, output: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe of a few optimizer steps in fp32, with sections' keys on top."""
    values: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": str(base), "device_map": "cpu"},
        "data": {"files": [str(files)]},
        "quantization": {"precision": "fp32", "bnb_4bit_compute_dtype": "float32"},
        "lora": {"r": 4, "lora_alpha": 8},
        "train": {"num_train_epochs": 2, "effective_batch_size": 6, "learning_rate": 2e-2},
    }
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes}
    return {**values, "output_dir": str(output)}


def tiny_recipe(base: Path, files: Path, output: Path, **sections: dict[str, Any]) -> Recipe:
    """`recipe_values`, validated."""
    return load_recipe(recipe_values(base, files, output, **sections))


def open_base(folder: Path) -> Checkpoint:
    """The folder as a checkpoint."""
    return open_checkpoint(ModelSection(name_or_path=str(folder)))


def tiny_model(base: Path, lora: LoraSection | None = None, *, seed: int = 0, **placement: Any) -> CausalLM:
    """The base model assembled on the CPU in fp32, unless `placement` says otherwise."""
    section = lora or LoraSection(r=4, lora_alpha=8)
    values = {"storage": Storage("fp32"), "compute_dtype": torch.float32, **placement}
    return assemble(
        open_base(base), Placement(**values), lambda anatomy: lora_config(section, anatomy, str(base), None), seed=seed
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Notes(Journal):
    """A journal without a folder that remembers its micro-batches too."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, Any]] = []

    def on_micro_batch(self, step: int, done: int, total: int, batch: Any) -> None:
        """Remember it."""
        self.batches.append((step, batch))


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(base: Path, path: Path) -> None:
    """The base model and its tokenizer as one GGUF file in float32, as llama.cpp lays a Llama out."""
    tensors = load_file(base / "model.safetensors")
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(str(path), "llama")
    heads = {"q_proj": settings["num_attention_heads"], "k_proj": settings["num_key_value_heads"]}
    _describe(writer, settings, json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))["model"])
    writer.add_tensor("token_embd.weight", tensors["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", tensors["model.norm.weight"].numpy())
    for i in range(settings["num_hidden_layers"]):
        for name, short in GGUF_NAMES.items():
            weight = tensors[f"model.layers.{i}.{name}.weight"].numpy()
            count = heads.get(name.rpartition(".")[2])
            if count:  # llama.cpp rotates neighbouring features, transformers the two halves of a head
                halves = weight.reshape(count, 2, -1, weight.shape[1])
                weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
            writer.add_tensor(f"blk.{i}.{short}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: gguf.GGUFWriter, settings: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(settings["vocab_size"])
    words = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    control, normal = 3, 1
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([control] * 3 + [normal] * (len(words) - 3))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
