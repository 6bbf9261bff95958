"""Every causal LM that transformers knows, tiny and random: is it right, refused in a sentence, wrong, or a crash?

For each family a random model of some layers is saved, loaded here, and its loss and every adapter gradient compared
with plain transformers and PEFT, which loads the adapter that was saved here:

    right     1e-5 of the gradient's norm, in fp32; activations kept and recomputed, padded, packed where allowed
              (or three times what transformers' own fp32 gradient is away from its fp64 one, where that is more)
    refused   a UserError before anything was trained; its sentence is kept
    wrong     a difference, or adapter tensors that PEFT does not take
    crash     any other exception, on the way to the plan or in a step
    unbuilt   transformers itself does not build, save or run the tiny configuration

    python bench/families.py bench/results/families-cpu.json [family ...]

PLAN=0 in the environment leaves the plan out, which takes most of the time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from bench.about import about
from bench.random_models import random_sequences
from drawplate.data.batches import cut_packed, cut_padded
from drawplate.errors import UserError
from drawplate.model.base.precision import Storage
from drawplate.model.base.weights import Checkpoint, open_checkpoint
from drawplate.model.causal_lm import CausalLM
from drawplate.model.layer.adapter_home import require_loadable
from drawplate.model.layer.anatomy import build_anatomy
from drawplate.model.load.assemble import assemble
from drawplate.model.placement import Placement
from drawplate.model.support.targets import lora_config
from drawplate.planner.situation import CorpusShape
from drawplate.recipe import LoraSection, ModelSection, Recipe, load_recipe
from drawplate.run.planning import plan_for_lengths

VOCAB = 97
LENGTHS = [5, 23, 14]
TOLERANCE = 1e-5
SECONDS = 150
WITH_PLAN = os.environ.get("PLAN", "1") == "1"
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "dim_model": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "ffn_dim": 48,
    "n_inner": 48,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "max_position_embeddings": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "sliding_window": 8,
    "query_pre_attn_scalar": 8,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "state_size": 8,
    "num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "lru_width": 32,
    "rotary_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CHANGES: dict[str, dict[str, Any]] = {
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_unified_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "hyperclovax": {"logits_scaling": 0.5},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "layer_types": ["mamba", "hybrid"] * 2},
    **{name: {"num_key_value_heads": 4} for name in ("minicpm3", "youtu", "deepseek_v2", "deepseek_v3")},
    "longcat_flash": {"num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 2, "activation_sparsity_pattern": None, "altup_num_inputs": 4},
    "phi3-longrope": {
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
        },
    },
    "llama-dynamic": {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    },
    "llama-yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}},
    "olmo": {"clip_qkv": 0.05},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1},
    "opt": {"word_embed_proj_dim": 32},
    "phi": {"num_key_value_heads": 4},
}
MORE = ("phi3-longrope", "llama-dynamic", "llama-yarn")


def families() -> list[str]:
    """Model types, causal LMs first; then the wrappers of text and images; then settings that matter."""
    causal = list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return list(dict.fromkeys([*causal, *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *MORE]))


def tiny_config(name: str, **sizes: Any) -> Any:
    """A small configuration: these sizes and those of `TINY` wherever a family has a setting of that name, in every
    part of it."""
    model_type = name if name in transformers.CONFIG_MAPPING else name.partition("-")[0]
    return _shrunk(transformers.CONFIG_MAPPING[model_type], name, TINY | sizes)


def _shrunk(kind: Any, name: str, sizes: dict[str, Any]) -> Any:
    default = kind()
    own = default.to_dict()
    values = {key: value for key, value in sizes.items() if key in own or key in kind.attribute_map}
    for key, part in kind.sub_configs.items():
        inner = getattr(default, key, None)
        if inner is not None:
            part = type(inner) if part is AutoConfig else part
            values[key] = _shrunk(part, part.model_type, sizes)
    return kind(**values | CHANGES.get(name, {}))


def named_class(config: Any, name: str) -> Any:
    """The class that a checkpoint of this family names."""
    for names in (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ):
        if config.model_type in names:
            return getattr(transformers, names[config.model_type])
    raise KeyError(name)


def write(folder: Path, name: str, **sizes: Any) -> Any:
    """A random model, saved; returns its class."""
    torch.manual_seed(7)
    config = tiny_config(name, **sizes)
    kind = named_class(config, name)
    model = kind._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__name__ == "Conv1D":
                for parameter in module.parameters(recurse=False):
                    parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return kind


def reference(
    kind: Any, folder: Path, adapter: Path, sequences: Any, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of nats over all documents and every adapter gradient, by transformers and PEFT."""
    from peft import PeftModel
    from safetensors.torch import load_file

    base = kind.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True).eval().to(dtype)
    own = {n.replace(".default.", "."): p for n, p in model.named_parameters() if ".default." in n}
    saved = load_file(adapter / "adapter_model.safetensors")
    by_value = {n: p for n, p in own.items() if n in saved and torch.equal(p.detach().float(), saved[n])}
    if len(by_value) != len(saved) or len(own) != len(saved):
        raise AssertionError(f"PEFT takes {len(by_value)} of {len(saved)} adapter tensors and has {len(own)}")
    total = torch.zeros((), dtype=dtype)
    for sequence in sequences:
        ids = torch.tensor(sequence.input_ids, dtype=torch.long)[None]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        total = total + nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
    total.backward()
    return total.detach(), {n: p.grad for n, p in own.items() if p.grad is not None}


def executor(checkpoint: Checkpoint, **placement: Any) -> CausalLM:
    """The family's model here."""
    place = Placement(storage=Storage("fp32"), compute_dtype=torch.float32, **placement)
    return assemble(
        checkpoint, place, lambda a: lora_config(LoraSection(r=4, lora_alpha=8), a, checkpoint.name, None), seed=0
    )


def randomise(model: CausalLM) -> None:
    """Adapters that change something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.adapter.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)


def difference(model: CausalLM, batches: Any, want: tuple[Tensor, dict[str, Tensor]]) -> float:
    """The larger of the loss's and the gradient's relative difference; a tensor without gradient counts as zero."""
    model.adapter.zero_gradients()
    total = sum(float(model.add_gradients(batch, scale=1.0, dropout_seed=None)) for batch in batches)
    norm = sum(float(g.square().sum()) for g in want[1].values()) ** 0.5
    off = 0.0
    for name, tensor in model.adapter.named_tensors().items():
        theirs = want[1].get(name)
        off += float((tensor.grad - (0 if theirs is None else theirs)).square().sum())
    return max(abs(total - float(want[0])) / abs(float(want[0])), off**0.5 / norm)


def examine(name: str, folder: Path, **sizes: Any) -> dict[str, Any]:
    """One family's outcome."""
    try:
        kind = write(folder, name, **sizes)
        transformers_runs(kind, folder)
    except Exception as error:
        return {"outcome": "unbuilt", "why": f"{type(error).__name__}: {str(error)[:200]}"}
    try:
        return compared(kind, folder)
    except UserError as error:
        return {"outcome": "refused", "why": error.what}
    except AssertionError as error:
        return {"outcome": "wrong", "why": str(error)[:300] or traceback.format_exc()[-600:]}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {
            "outcome": "crash",
            "why": f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})",
            "traceback": traceback.format_exc()[-2500:],
        }


def transformers_runs(kind: Any, folder: Path) -> None:
    """transformers' own module on its own files."""
    base, said = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not said["missing_keys"], f"transformers does not load what it saved: {len(said['missing_keys'])} tensors"
    base.eval()
    assert torch.isfinite(base(input_ids=torch.ones(1, 9, dtype=torch.long)).logits).all()


def compared(kind: Any, folder: Path) -> dict[str, Any]:
    """The plan, then every way of running against transformers and PEFT."""
    checkpoint = open_checkpoint(ModelSection(name_or_path=str(folder)))
    recipe = recipe_for(folder)
    anatomy = build_anatomy(checkpoint.config)
    if WITH_PLAN:
        plan_for_lengths(recipe, checkpoint, anatomy, CorpusShape(lengths=tuple(LENGTHS), heldout_lengths=(5,)), 64)
    sequences = random_sequences(LENGTHS, VOCAB)
    differences: dict[str, float] = {}
    refused: dict[str, str] = {}
    found: dict[str, Any]
    want = None
    for policy in ("keep", "recompute"):
        try:
            model = executor(checkpoint, activations=policy)
        except UserError as error:
            if want is None:
                raise
            refused[policy] = error.what
            continue
        randomise(model)
        if want is None:
            model.adapter.save(folder / "adapter")
            require_loadable(folder / "adapter", model.anatomy.home, model.adapter.named_tensors())
            want = reference(kind, folder, folder / "adapter", sequences)
        ways = {"padded": cut_padded(sequences, 3, 8, 0), "packed": cut_packed(sequences, 64, 8, 0)}
        for way, batches in ways.items():
            try:
                differences[f"{policy} {way}"] = difference(model, batches, want)
            except UserError as error:
                refused[f"{policy} {way}"] = error.what
    assert want is not None
    if not differences:
        return {"outcome": "refused", "why": next(iter(refused.values()))}
    worst, found = max(differences.values()), {"differences": differences, "refused": refused}
    if worst > TOLERANCE:
        found["noise"] = noise(want, reference(kind, folder, folder / "adapter", sequences, torch.float64))
    outcome = "right" if worst <= max(TOLERANCE, 3 * found.get("noise", 0.0)) else "wrong"
    return {"outcome": outcome, "worst": worst, **found}


def noise(single: tuple[Tensor, dict[str, Tensor]], double: tuple[Tensor, dict[str, Tensor]]) -> float:
    """How far transformers' own fp32 gradient is from its fp64 gradient, as a share of the norm."""
    off = sum(float((single[1][name] - g).square().sum()) for name, g in double[1].items())
    return (off / sum(float(g.square().sum()) for g in double[1].values())) ** 0.5


def recipe_for(folder: Path) -> Recipe:
    """What a plan needs."""
    return load_recipe(
        {
            "model": {"name_or_path": str(folder), "device_map": "cpu"},
            "data": {"files": [str(folder)]},
            "quantization": {"precision": "fp32", "bnb_4bit_compute_dtype": "float32"},
            "output_dir": str(folder / "out"),
        }
    )


def _child(name: str, answer: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        answer.send(examine(name, Path(folder)))


def main() -> None:
    """Go over all families, each in a process of its own."""
    out, names = Path(sys.argv[1]), sys.argv[2:] or families()
    context = multiprocessing.get_context("fork")
    found: dict[str, Any] = {}
    for name in names:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(name, theirs))
        child.start()
        theirs.close()
        try:
            found[name] = ours.recv() if ours.poll(SECONDS) else {"outcome": "crash", "why": f"nothing in {SECONDS} s"}
        except EOFError:
            found[name] = {"outcome": "crash", "why": "the process died"}
        child.kill()
        child.join()
        shown = found[name]
        print(f"{name:24} {shown['outcome']:8} {shown.get('worst', '')} {shown.get('why', '')}", flush=True)
        _write(out, found)
    print(counts_of(found))


def counts_of(found: dict[str, Any]) -> dict[str, int]:
    """How many families have each outcome."""
    kinds = ("right", "refused", "wrong", "crash", "unbuilt")
    return {kind: sum(f["outcome"] == kind for f in found.values()) for kind in kinds}


def _write(out: Path, found: dict[str, Any]) -> None:
    made = {**about(), "tolerance": TOLERANCE, "planned": WITH_PLAN, "counts": counts_of(found), "families": found}
    out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
