"""What every system is given: a checkpoint of random weights, a tokenizer, and the adapter's initial values.

Made once per machine, from fixed seeds, on the GPU where there is one; a few seconds and 2 bytes a parameter of disk.

The weights are normal with a standard deviation of 0.02, but what layers add to the residual is made small: norms in
layers are 1/4, and the projections back into the residual 1/64 of the others. All layers together then add about as
much as the embedding holds. With plain 0.02 each layer adds many times that, and such a model amplifies any rounding
until nothing is left of it: after 32 layers hidden states would be 59 % off in fp8 and 102 % in NF4, and a gate that
compares losses would compare chance (bench/results/rounding-cpu.json). The last norm is 1/10, or a tied head would see
a token's own embedding above all else. Speeds do not depend on any of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.peers.cases import PRODUCTS
from bench.shapes import shape_config

SHARD_BYTES = 2 * 2**30
MISSION_LORA: dict[str, Any] = {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
LORA, START = "lora.json", "start.safetensors"
WORDS = 1000
DEVIATION = 0.02
LAYER_NORM, LAST_NORM = 0.25, 0.1
RESIDUAL_SHARE = 1 / 64
INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight")


def make_material(folder: Path, shape: str, layers: int | None) -> None:
    """Checkpoint, tokenizer and adapter start in `folder`; nothing where they are there already."""
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "made.json"
    facts = {"deviation": DEVIATION, "norms": [LAYER_NORM, LAST_NORM], "residual_share": RESIDUAL_SHARE}
    wanted = json.dumps({"shape": shape, "layers": layers, **facts})
    if done.is_file() and done.read_text() == wanted:
        return
    config = shape_config(shape, layers=layers)
    config.save_pretrained(folder)
    _save_weights(folder, config)
    _save_tokenizer(folder)
    save_start(folder, config, MISSION_LORA)
    done.write_text(wanted)


def measure_device() -> None:
    """While nobody else uses it: as Drawplate's planner measures a new device once and keeps that in its cache folder.

    Beside it the rate of large products, the best of some rounds, for bench/peers/ceiling.py.
    """
    from drawplate.machine.speed import measured_speed
    from drawplate.recipe import cache_folder

    measured_speed(torch.device("cuda", 0), torch.bfloat16)
    (cache_folder() / PRODUCTS).write_text(f"{product_rate():.4g}\n")


def product_rate(size: int = 8192, calls: int = 10, rounds: int = 8) -> float:
    """FLOPs a second of square bf16 products: the fastest round."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    seconds = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            a @ b
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000 / calls)
    return 2 * size**3 / min(seconds)


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
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
        if len(shape) == 1:
            tensor = tensor.fill_(LAYER_NORM if ".layers." in name else LAST_NORM).cpu()
        else:
            deviation = DEVIATION * (RESIDUAL_SHARE if name.endswith(INTO_RESIDUAL) else 1.0)
            tensor = tensor.normal_(0, deviation, generator=generator).cpu()
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


def save_start(folder: Path, config: Any, lora: dict[str, Any]) -> None:
    """Write the adapter's shape and its initial values, which every system starts from."""
    (folder / LORA).write_text(json.dumps(lora))
    save_file(initial_adapter(config, lora), folder / START)


def initial_adapter(config: Any, lora: dict[str, Any]) -> dict[str, Tensor]:
    """PEFT's names -> fp32 values, as PEFT draws them: A uniform in +-1/sqrt(inputs) (Kaiming, a = sqrt(5)), B zero."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(13)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    start = {}
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or path.rpartition(".")[2] not in lora["target_modules"]:
            continue
        bound = module.in_features**-0.5
        a = torch.empty(lora["r"], module.in_features).uniform_(-bound, bound, generator=generator)
        start[f"base_model.model.{path}.lora_A.weight"] = a
        start[f"base_model.model.{path}.lora_B.weight"] = torch.zeros(module.out_features, lora["r"])
    return start


def load_lora(folder: Path) -> dict[str, Any]:
    """r, lora_alpha and target_modules."""
    values: dict[str, Any] = json.loads((folder / LORA).read_text())
    return values


def load_start(folder: Path) -> dict[str, Tensor]:
    """The adapter's initial values."""
    return load_file(folder / START)
