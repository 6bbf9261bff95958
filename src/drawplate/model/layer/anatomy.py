"""config.json -> the parts of a causal LM, on the meta device: nothing is allocated, every shape is known.

A causal LM is embedding -> L decoder layers -> norm -> head. transformers builds the module; this file only finds the
parts in it and says plainly when they cannot be found. It does not load weights and does not change the module.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from drawplate.errors import UsageError, reason_of
from drawplate.model.base.foreign import refusing
from drawplate.model.base.rotary import by_document
from drawplate.model.layer import causal_attention
from drawplate.model.layer.adapter_home import Home, home_of
from drawplate.model.layer.attention import NAME, register


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal LM, as modules on the meta device.

    Attributes:
        config: the text configuration.
        skeleton: the whole module, as transformers builds it.
        body: what maps embeddings to the last hidden state; its `forward` is transformers' own.
        layers: the decoder layers, in order.
        layers_path: where they are in the skeleton, like `model.layers`.
        embedding_path, head_path: names of the two modules.
        tied: the head's weight is the embedding's.
        home: the class that the checkpoint names, on which adapters are loaded.
    """

    config: PretrainedConfig
    skeleton: nn.Module
    body: nn.Module
    layers: nn.ModuleList
    layers_path: str
    embedding_path: str
    head_path: str
    tied: bool
    home: Home

    @property
    def architecture(self) -> str:
        """The name of its class, like LlamaForCausalLM."""
        return type(self.skeleton).__name__

    @property
    def one_by_one(self) -> bool:
        """Whether a GPU attends to packed documents one by one: torch's kernel for all of them takes no soft cap of the
        scores (Gemma 2), heads of at most 256 features, a multiple of 8, and no GPU before Ampere
        (model/layer/attention.py).
        """
        capped = bool(getattr(self.config, "attn_logit_softcapping", None))
        unfit = any(size > 256 or size % 8 > 0 for size in self.head_sizes)
        return capped or unfit or not causal_attention.flash_runs

    @property
    def head_sizes(self) -> set[int]:
        """Features of an attention head, by the layers' modules (Gemma 4's differ), else by the configuration."""
        found = {getattr(module, "head_dim", None) for layer in self.layers for module in layer.modules()}
        sizes = {size for size in found if isinstance(size, int) and size > 0}
        if sizes:
            return sizes
        heads = getattr(self.config, "num_attention_heads", None) or 1
        return {getattr(self.config, "head_dim", None) or self.config.hidden_size // heads}

    @property
    def inputs_by_layer(self) -> tuple[int, ...]:
        """(layers, features) of what the body hands to each layer of a token beside its hidden states (Gemma 4 E2B and
        E4B); empty where it hands nothing. From embeddings alone it would search its whole table for each token."""
        width = getattr(self.config, "hidden_size_per_layer_input", None)
        takes = "per_layer_inputs" in signature(self.body.forward).parameters
        return (len(self.layers), width) if width and takes else ()

    @property
    def softcap(self) -> float | None:
        """logits -> softcap * tanh(logits / softcap), where the architecture has it (Gemma 2, RecurrentGemma)."""
        return getattr(self.config, "final_logit_softcapping", None) or getattr(self.config, "logits_soft_cap", None)

    @property
    def logit_scale(self) -> float:
        """Factor on the logits: Cohere multiplies by logit_scale, HyperCLOVA X by logits_scaling, Falcon-H1 by
        lm_head_multiplier; Granite divides by logits_scaling."""
        if (factor := getattr(self.config, "lm_head_multiplier", None)) is not None:
            return float(factor)
        if (divisor := getattr(self.config, "logits_scaling", None)) is not None:
            return float(divisor) if self.config.model_type == "hyperclovax" else 1.0 / divisor
        return float(getattr(self.config, "logit_scale", None) or 1.0)

    @property
    def parameters(self) -> int:
        """Parameters of the base model, tied ones counted once."""
        return sum(p.numel() for p in self.skeleton.parameters())


def build_anatomy(config: PretrainedConfig, *, attention: str = NAME) -> Anatomy:
    """The anatomy of the causal LM that `config` describes, with a configuration of its own.

    The copy matters: a module reads its attention from its configuration at every call, so two skeletons that shared
    one would both use whatever the later asked for.

    Raises:
        UsageError: the architecture is not a causal LM with one list of decoder layers.
    """
    register()
    whole = copy.deepcopy(config)
    config = copy.deepcopy(config.get_text_config() if hasattr(config, "get_text_config") else config)
    if type(config) is not type(whole):  # the class around a text model decides what is tied in it
        config.tie_word_embeddings = bool(getattr(whole, "tie_word_embeddings", False))
    name = (config.architectures or [config.model_type])[0]
    with refusing(name):
        skeleton = _skeleton(config, attention, name)
        return _anatomy(whole, config, skeleton, name)


def _skeleton(config: PretrainedConfig, attention: str, name: str) -> nn.Module:
    """transformers' module without data, as a reference just as transformers wrote it."""
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    except KeyError:  # a table of its own attention classes, from before transformers had one interface
        raise UsageError(
            f"{name} computes attention in a way of its own, whose mask would be lost.",
            safe="Nothing was loaded or written.",
            next_step="Choose a model such as Llama, Mistral, Qwen, Gemma, Phi, SmolLM or OLMo.",
        ) from None
    except ValueError as error:
        unknown = str(error).startswith("Unrecognized configuration class")
        why = "it has no text-only class" if unknown else reason_of(error)
        raise UsageError(
            f"{name} is not a causal language model that transformers can build: {why}.",
            safe="Nothing was loaded or written.",
            next_step="Choose a decoder-only model such as Llama, Mistral, Qwen, Gemma, Phi, SmolLM or OLMo.",
        ) from None
    skeleton.requires_grad_(False)
    if attention == NAME:
        by_document(skeleton)
    return skeleton


def _anatomy(whole: PretrainedConfig, config: PretrainedConfig, skeleton: Any, name: str) -> Anatomy:
    layers_path, layers = _decoder_layers(skeleton, config, name)
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    if embedding is None or not isinstance(head, nn.Linear):
        raise UsageError(f"{name} has no linear head over its vocabulary.", next_step="Choose another base model.")
    return Anatomy(
        config=config,
        skeleton=skeleton,
        body=skeleton.base_model,
        layers=layers,
        layers_path=layers_path,
        embedding_path=_path_of(skeleton, embedding),
        head_path=_path_of(skeleton, head),
        tied=head.weight is embedding.weight or bool(getattr(config, "tie_word_embeddings", False)),
        home=home_of(whole, skeleton, layers_path),
    )


def _decoder_layers(skeleton: nn.Module, config: Any, name: str) -> tuple[str, nn.ModuleList]:
    lists = [
        (path, module)
        for path, module in skeleton.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    if len(lists) != 1 and hasattr(config, "decoder_layers"):
        raise UsageError(
            f"{name} is the decoder of an encoder-decoder model, which Drawplate does not train.",
            safe="Nothing was loaded or written.",
            next_step="Choose a decoder-only model such as Llama, Mistral, Qwen, Gemma, Phi, SmolLM or OLMo.",
        )
    if len(lists) != 1:
        raise UsageError(
            f"{name} has {len(lists)} lists of {config.num_hidden_layers} layers where one was expected.",
            next_step="Choose a model with one stack of decoder layers (Llama, Mistral, Qwen, Gemma, Phi, OLMo, ...).",
        )
    return lists[0]


def _path_of(root: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in root.named_modules() if module is wanted)
