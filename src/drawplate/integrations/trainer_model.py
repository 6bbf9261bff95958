"""A model of Drawplate's executor for other people's loops: `transformers.Trainer`, TRL's SFTTrainer, or one's own.

To the loop it is a `peft.PeftModel` whose only parameters are the adapter's: optimizers, gradient clipping,
checkpoints, resuming and best-model reloading work as they do for PEFT, and what they write is PEFT's format. The base
model is no module of it. It stays where `prepare_model` put it, in the precision and dtype chosen there: `.to()`,
`.half()` and autocast (`bf16=True`) change nothing.

Given labels, the forward returns the loss and no logits, which never exist then; an evaluation that wants logits must
call it without labels. Left out: `nn.DataParallel` (several GPUs in one process), and everything that edits the base
model: merging, more adapters, new tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import PeftType
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutput

from drawplate.data.batches import Batch
from drawplate.errors import IntegrityError, UsageError
from drawplate.integrations.generation import generate
from drawplate.integrations.head_outputs import TokenScores, entropy_and_top1, head_logits, token_nats
from drawplate.integrations.trainer_inputs import batch_of
from drawplate.model.base.weights import Checkpoint
from drawplate.model.causal_lm import CausalLM
from drawplate.model.layer.adapter import read_adapter
from drawplate.model.layer.anatomy import build_anatomy

ADAPTER = "default"
STATE_NAME = "drawplate_state.json"


class DrawplateForCausalLM(PeftModel):
    """An assembled model behind the interface that training loops know. Usually made by `prepare_model`.

    Args:
        model: base model and adapter.
        checkpoint: where the base model came from.
        seed: of the adapter's dropout, whose masks differ from one forward in train() mode to the next.

    Attributes:
        causal_lm: the executor's own model.
        config: transformers' configuration of the base model.
        generation_config: what `generate` does unless told otherwise.
    """

    main_input_name = "input_ids"
    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"  # to the Trainer: labels are shifted here, so the first of a row is not counted

    def __init__(self, model: CausalLM, checkpoint: Checkpoint, *, seed: int = 0) -> None:
        nn.Module.__init__(self)  # PeftModel's own would put PEFT's layers into the base model
        self.causal_lm, self.seed = model, seed
        skeleton: Any = model.anatomy.skeleton
        self.config = skeleton.config
        self.config._name_or_path = checkpoint.loadable_name
        if (checkpoint.folder / "generation_config.json").is_file():
            skeleton.generation_config = GenerationConfig.from_pretrained(checkpoint.folder, local_files_only=True)
        self.generation_config = skeleton.generation_config
        self.active_adapter, self.peft_type = ADAPTER, PeftType.LORA
        self._is_prompt_learning, self._adapters_disabled = False, False
        self.model_tags: list[str] = []
        self.forwards = 0
        for name, parameter in model.adapter.named_tensors().items():
            _register(self, name, parameter)
        base = self.get_submodule("base_model.model")
        base._get_name = lambda: type(skeleton).__name__  # type: ignore[method-assign]  # Trainer's label smoothing asks

    @property
    def device(self) -> torch.device:
        """Where layers are computed."""
        return self.causal_lm.placement.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return self.causal_lm.placement.compute_dtype

    @property
    def peft_config(self) -> dict[str, LoraConfig]:  # type: ignore[override]
        """The one adapter's configuration."""
        return {ADAPTER: self.causal_lm.adapter.config}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | TokenScores:
        """The loss of a micro-batch, or its logits (B, T, V) where there are no labels.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 1 for tokens, 0 for padding to their right.
            position_ids: (B, T); where they do not go on by one, a new document begins, which sees only itself.
            labels: (B, T), not shifted; -100 is not counted.
            num_items_in_batch: tokens that the optimizer step counts; the loss is then the sum of nats over this.
            **kwargs: `shift_labels`, `cu_seq_lens_q`, `logits_to_keep` as in transformers; `fused_lm_head` as in TRL,
                for `TokenScores`; what else training loops pass along is ignored.

        Raises:
            ValueError: inputs that do not belong together, or are not supported; see `batch_of`.
        """
        for name in ("inputs_embeds", "past_key_values"):
            if kwargs.get(name) is not None:
                raise ValueError(f"forward takes input_ids and no {name}; for text on a cache call generate()")
        batch = batch_of(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            shift_labels=kwargs.get("shift_labels"),
            cu_seqlens=kwargs.get("cu_seq_lens_q"),
        )
        items = batch.counted_tokens if num_items_in_batch is None else num_items_in_batch
        dropout_seed = self._next_dropout_seed() if self.training else None
        with torch.autocast(self.device.type, enabled=False):
            if kwargs.get("fused_lm_head"):
                return self._token_scores(batch, input_ids.shape, items, dropout_seed)
            if labels is None and kwargs.get("shift_labels") is None:
                return self._logits(batch, input_ids.shape, kwargs.get("logits_to_keep") or 0, dropout_seed)
            nats, _ = self.causal_lm.sum_nats(batch, dropout_seed=dropout_seed)
            return CausalLMOutput(loss=_over(nats, items))

    def _logits(
        self, batch: Batch, shape: torch.Size, to_keep: int | Tensor, dropout_seed: tuple[int, int] | None
    ) -> CausalLMOutput:
        hidden_BTH = self.causal_lm.hidden_states(batch, dropout_seed=dropout_seed)
        hidden_BTH = hidden_BTH.reshape(*shape, hidden_BTH.shape[-1])
        kept = slice(-to_keep, None) if isinstance(to_keep, int) else to_keep
        hidden_BTH = hidden_BTH[:, kept]
        logits_NV = head_logits(hidden_BTH.flatten(0, 1), self.causal_lm.head)
        return CausalLMOutput(logits=logits_NV.unflatten(0, hidden_BTH.shape[:2]))

    def _token_scores(
        self, batch: Batch, shape: torch.Size, items: Tensor | int, dropout_seed: tuple[int, int] | None
    ) -> TokenScores:
        hidden_BTH = self.causal_lm.hidden_states(batch, dropout_seed=dropout_seed)
        hidden_NH, targets_N = hidden_BTH.flatten(0, 1), batch.targets_BT.flatten()
        head = self.causal_lm.head
        nats_N = token_nats(hidden_NH, head, targets_N, batch.counted_tokens)
        entropy_N, top1_N = entropy_and_top1(hidden_NH.detach(), head, targets_N)
        counted_N = (targets_N >= 0).to(nats_N.device)
        return TokenScores(
            loss=_over(nats_N.sum(), items),
            log_probs=-nats_N.view(shape)[:, :-1],
            entropy=entropy_N.view(shape)[:, :-1],
            is_top1=top1_N.view(shape)[:, :-1],
            label_mask=counted_N.view(shape)[:, :-1],
        )

    def _next_dropout_seed(self) -> tuple[int, int]:
        """A pair that no other training forward of the run has, on any process."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        world, rank = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if distributed else (1, 0)
        self.forwards += 1
        return self.seed, self.forwards * world + rank

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' own `generate`, with the layers where they are; see `integrations.generation`.

        Args:
            inputs: (B, T) prompts of one length; or as `input_ids`.
            **kwargs: as transformers' `generate` takes them.

        Raises:
            UsageError: padded prompts.
        """
        ids = kwargs.pop("input_ids", inputs)
        if ids is None:
            raise ValueError("generate() needs input_ids")
        return generate(self.causal_lm, ids, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute activations in backward; the arguments that concern torch's own checkpointing are ignored.

        Args:
            gradient_checkpointing_kwargs: ignored.
            **kwargs: `every_n_layers`: recompute only layers 0, n, 2n ...; `offload`: keep inputs on the host.
        """
        policy, every = "offload" if kwargs.get("offload") else "recompute", kwargs.get("every_n_layers") or 1
        layers = len(self.causal_lm.anatomy.layers)
        self.causal_lm.set_policies([policy if layer % every == 0 else "keep" for layer in range(layers)])

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations."""
        self.causal_lm.set_policies(["keep"] * len(self.causal_lm.anatomy.layers))

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """transformers' newer name of `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """transformers' newer name of `gradient_checkpointing_disable`."""
        self.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any layer is recomputed."""
        return set(self.causal_lm.runner.policies) != {"keep"}

    def enable_input_require_grads(self) -> None:
        """Nothing to do: recomputation here needs no gradient at the embeddings."""

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write the adapter as PEFT does, with `drawplate_state.json` beside it, which `load_adapter` goes on from.

        Args:
            save_directory: made if need be.
            state_dict: the adapter's tensors where they are not to be what they are now.
            is_main_process: False writes nothing.
            **kwargs: how else PEFT could write it; ignored.

        Raises:
            IntegrityError: what was written is not what is trained.
        """
        if not is_main_process:
            return
        folder = Path(save_directory)
        self.causal_lm.adapter.save(folder, state_dict)
        (folder / STATE_NAME).write_text(json.dumps({"forwards": self.forwards}) + "\n", encoding="utf-8")

    def load_adapter(  # type: ignore[override]
        self, model_id: str | Path, adapter_name: str = ADAPTER, **kwargs: Any
    ) -> None:
        """Set the adapter to a saved one, and go on with the dropout where it was; what the Trainer resumes with.

        Args:
            model_id: a folder with a PEFT LoRA adapter.
            adapter_name: `default`, the only one.
            **kwargs: how else PEFT could load it; ignored.

        Raises:
            UsageError: another name, no adapter there, or one that scales its update differently.
            IntegrityError: an adapter that does not fit.
        """
        if adapter_name != ADAPTER:
            raise UsageError(f"There is no room for an adapter {adapter_name}.", next_step=f"Call it {ADAPTER}.")
        folder, own = Path(model_id), self.causal_lm.adapter
        config, state = read_adapter(folder)
        for key in ("r", "lora_alpha", "use_rslora"):
            if getattr(config, key) != getattr(own.config, key):
                raise UsageError(
                    f"The adapter in {folder} has {key} {getattr(config, key)}, this model {getattr(own.config, key)}.",
                    safe="Nothing was changed.",
                    next_step=f"Prepare the model with lora {key} {getattr(config, key)}.",
                )
        own.load_state(state, str(folder))
        if (folder / STATE_NAME).is_file():
            self.forwards = _read_forwards(folder / STATE_NAME)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> DrawplateForCausalLM:
        """Refused: a base model is prepared first."""
        raise UsageError(
            "DrawplateForCausalLM is not loaded by from_pretrained.",
            next_step="Call drawplate.prepare_model(base model, ...), then load_adapter(folder).",
        )

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within it, the model is the base model."""
        adapter = self.causal_lm.adapter
        own = adapter.layers
        adapter.layers = [_without_effect(layer) for layer in own]
        try:
            yield
        finally:
            adapter.layers = own

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(numbers that are trained, all numbers with the base model's)."""
        trained = self.causal_lm.adapter.parameter_count
        return trained, trained + build_anatomy(self.config).parameters

    def get_base_model(self) -> nn.Module:
        """This very module, for loops that look behind an adapter for the forward's signature."""
        return self

    def get_output_embeddings(self) -> None:
        """None: the head is no module, and may not be on the device."""

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Remember tags for a model card."""
        new = [tags] if isinstance(tags, str) else tags
        self.model_tags += [tag for tag in new if tag not in self.model_tags]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward" and self._is_trls_own_head(value):
            return
        super().__setattr__(name, value)

    @staticmethod
    def _is_trls_own_head(forward: Any) -> bool:
        """TRL replaces `forward` by one that multiplies with lm_head.weight on the device. From 1.15 on it is called
        with an argument that this class knows itself, with the head wherever it is; before, there was no such way.
        """
        if "fused_lm_head" in signature(forward, follow_wrapped=False).parameters:
            return True
        if str(getattr(forward, "__module__", "")).startswith("trl."):
            raise UsageError(
                "This TRL trainer needs the head's weights in one piece.", next_step="Use TRL 1.15 or newer."
            )
        return False

    def _apply(self, fn: Any, recurse: bool = True) -> DrawplateForCausalLM:
        return self  # `.to()` and its kin: the plan decided where everything lives

    def _replicate_for_data_parallel(self) -> DrawplateForCausalLM:
        raise UsageError(
            "The training loop wants nn.DataParallel over several GPUs in one process.",
            next_step="Start one process a GPU (torchrun, accelerate launch), or set CUDA_VISIBLE_DEVICES to one.",
        )


def _register(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """A parameter under a dotted name, in empty modules on the way."""
    *parents, leaf = name.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.register_parameter(leaf, parameter)


def _without_effect(layer: dict[str, nn.Parameter]) -> dict[str, Any]:
    """An adapter layer that adds nothing; trained biases are left out, so that the stored ones count."""
    return {
        name: tensor.new_zeros(()).expand(tensor.shape) if name.endswith("lora_B") else tensor
        for name, tensor in layer.items()
        if not name.endswith(".bias")
    }


def _over(nats: Tensor, items: Tensor | int) -> Tensor:
    """Nats over tokens; no tokens, no loss."""
    return nats / torch.as_tensor(items, device=nats.device).clamp(min=1)


def _read_forwards(path: Path) -> int:
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["forwards"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise IntegrityError(
            f"{path} cannot be read: {error!r}",
            safe="The adapter beside it was loaded.",
            next_step=f"Delete {path.name} to go on without it; dropout masks then start from the beginning.",
        ) from None
