"""A causal LM put together from its parts, ready to give the nats of a micro-batch.

    ids -> embedding -> transformers' own body, whose decoder layers are ExecutedLayers -> last hidden state
                                                                    -> frozen head and cross-entropy -> nats

Training, evaluation and `prepare_model` all use it; `model/load/assemble.py` makes it.

Left out: dropout that a configuration asks for inside the layers (residual, attention). The modules stay in evaluation
mode, so that the only noise is the adapter's own dropout, which is a function of the token (model/layer/dropout.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drawplate.data.batches import Batch
from drawplate.errors import UsageError
from drawplate.model.base.rotary import longest_text
from drawplate.model.cuda_graphs import GraphedSteps
from drawplate.model.device_batch import DeviceBatch, ShapeBounds, sent
from drawplate.model.ends.embedding import embedded
from drawplate.model.ends.head import Head
from drawplate.model.ends.loss import head_cross_entropy
from drawplate.model.layer.adapter import Adapter
from drawplate.model.layer.anatomy import Anatomy
from drawplate.model.layer.dropout import token_keys
from drawplate.model.layer.runner import LayerRunner
from drawplate.model.placement import Placement
from drawplate.model.stream.weight_ring import Residency


class CausalLM:
    """A base model with frozen weights somewhere and an adapter on the device. Made by `assemble`.

    Attributes:
        anatomy: its parts.
        placement: where they live.
        adapter: what is trained.
        residency: where the layers' weights are.
        unpackable: why documents would mix if several shared a row; empty where they would not.
    """

    def __init__(
        self, anatomy: Anatomy, placement: Placement, adapter: Adapter, residency: Residency, *, unpackable: str = ""
    ) -> None:
        self.anatomy, self.placement, self.unpackable = anatomy, placement, unpackable
        self.adapter, self.residency = adapter, residency
        self.runner = LayerRunner(
            list(anatomy.layers),
            residency,
            adapter,
            placement.policies(len(anatomy.layers)),
            compiled=placement.compiled,
            whole_dtype=placement.compute_dtype if placement.dequantize == "layer" else None,
        )
        self.embedding: nn.Embedding
        self.head: Head
        # One long held-out document must not widen what is trained on: the two are compiled apart anyway.
        self._bounds = {"training": ShapeBounds(), "measuring": ShapeBounds()}
        captures = placement.captures(self.runner.policies)
        self.graphed = GraphedSteps(self._nats, adapter, residency, self._settle) if captures else None

    def sum_nats(
        self,
        batch: Batch,
        *,
        scale: float = 1.0,
        dropout_seed: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of a micro-batch, as a sum.

        Args:
            batch: in host memory.
            scale: factor on the returned loss, such as 1 / tokens of the optimizer step.
            dropout_seed: (seed, epoch); None switches the adapter's dropout off.

        Returns:
            `scale` times the sum of nats over counted targets, differentiable in the adapter where autograd is on; and
            the nats of each position, detached, shape (B * T,), 0 where not counted.
        """
        loss, nats_N = self._nats(self.placed(batch, dropout_seed), scale)
        rows, width = batch.targets_BT.shape
        return loss, nats_N.view(rows, -1)[:, :width].reshape(-1)

    def add_gradients(self, batch: Batch, *, scale: float, dropout_seed: tuple[int, int] | None) -> Tensor:
        """One training micro-step: add the gradients of `sum_nats` to the adapter's.

        Returns:
            The sum of nats in float64, on the device; good until the next call.
        """
        # Policies may change when memory is short.
        if self.graphed is not None and self.placement.captures(self.runner.policies):
            return self.graphed.run(self.placed(batch, dropout_seed), scale)
        loss, nats_N = self.sum_nats(batch, scale=scale, dropout_seed=dropout_seed)
        loss.backward()
        return nats_N.sum(dtype=torch.float64)

    def set_policies(self, policies: Sequence[str] | None) -> None:
        """What becomes of each layer's activations from now on; None as they were placed.

        Captured graphs are let go of: each holds what its layers did with theirs."""
        layers = len(self.anatomy.layers)
        self.runner.set_policies(self.placement.policies(layers) if policies is None else policies)
        self.forget_graphs()

    def forget_graphs(self) -> None:
        """Give back what captured micro-steps hold, before something else needs memory."""
        if self.graphed is not None:
            self.graphed.forget()

    def placed(self, batch: Batch, dropout_seed: tuple[int, int] | None) -> DeviceBatch:
        """The micro-batch on the device, nothing waited for; on a GPU in one of few shapes.

        Raises:
            UsageError: several documents are in a row of a model that would mix them, or it has no such token.
        """
        largest, rows = int(batch.input_ids_BT.max()), self.embedding.weight.shape[0]
        if largest >= rows:  # a lookup on a GPU would end the process, or read what lies behind the table
            raise UsageError(
                f"The tokenizer gives the token {largest}, and the model's embedding has {rows} rows.",
                safe="What was saved before stays.",
                next_step="Use the tokenizer that belongs to the base model, or a model with a larger embedding.",
            )
        longest = longest_text(self.anatomy.config)
        if longest is not None and batch.longest_document > longest:
            raise UsageError(
                f"{self.anatomy.architecture} has rotary tables that grow with a text of more than {longest} tokens "
                "(rope_type: dynamic), which Drawplate does not follow.",
                safe="What was saved before stays.",
                next_step=f"Set data.max_length: {longest}, or less.",
            )
        if self.unpackable and batch.cu_seqlens is not None and len(batch.documents) > 1:
            raise UsageError(
                f"{self.anatomy.architecture} cannot take packed documents: {self.unpackable}.",
                safe="Nothing was trained.",
                next_step="Set data.packing: false.",
            )
        device, keys = self.placement.device, None
        borders, segments = batch.cu_seqlens, ()
        if device.type == "cuda":
            batch, borders = self._bounds["training" if torch.is_grad_enabled() else "measuring"].fit(batch)
        elif borders is not None:
            segments = tuple(borders.tolist())
        if dropout_seed is not None and self.adapter.config.lora_dropout > 0:
            keys = sent(token_keys(batch.sequence_ids_BT, batch.position_ids_BT, *dropout_seed), device)
        return DeviceBatch(
            ids_BT=sent(batch.input_ids_BT, device),
            position_ids_BT=sent(batch.position_ids_BT, device),
            targets_N=sent(batch.targets_BT.reshape(-1), device),
            token_keys_BT=keys,
            borders=None if borders is None else sent(borders, device),
            longest=0 if borders is None else batch.max_seqlen,
            segments=segments,
            counted=batch.counted_tokens,
        )

    def _nats(self, batch: DeviceBatch, scale: float | Tensor) -> tuple[Tensor, Tensor]:
        hidden_BTH = self._hidden_states(batch)
        hidden_NH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])
        return head_cross_entropy(hidden_NH, self.head, batch.targets_N, scale=scale, counted=batch.counted)

    def not_finite(self) -> str:
        """The name of a stored tensor that holds values which are not numbers; empty where none does."""
        path, layers = self.anatomy.layers_path, len(self.anatomy.layers)
        named: list[tuple[str, Tensor]]
        named = [(f"the adapter's {name}", tensor) for name, tensor in self.adapter.named_tensors().items()]
        named += [(name, tensor) for name, tensor in self.anatomy.skeleton.named_parameters() if not tensor.is_meta]
        named += [
            (f"{path}.{i}.{name}", tensor) for i in range(layers) for name, tensor in self.residency.stored(i).items()
        ]
        floats = ((name, t) for name, t in named if t.is_floating_point() and t.element_size() > 1)
        return next((name for name, tensor in floats if not bool(torch.isfinite(tensor.detach()).all())), "")

    def hidden_states(self, batch: Batch, *, dropout_seed: tuple[int, int] | None = None) -> Tensor:
        """The body's output, shape (B, T, H), before the head.

        Raises:
            UsageError: several documents are in a row of a model that would mix them.
        """
        hidden_BTH = self._hidden_states(self.placed(batch, dropout_seed))
        return hidden_BTH[:, : batch.targets_BT.shape[1]]

    def _hidden_states(self, batch: DeviceBatch) -> Tensor:
        self.runner.begin(batch.token_keys_BT)
        arguments = batch.attention
        if self.anatomy.inputs_by_layer:
            arguments = {**arguments, "per_layer_inputs": self._inputs_by_layer(batch.ids_BT)}
        return self.body_forward(self.embed(batch.ids_BT), batch.position_ids_BT, arguments)

    @torch.no_grad()
    def _inputs_by_layer(self, ids_BT: Tensor) -> Tensor:
        """Each token's rows of the table that the body has for its layers, shape (B, T, L, features)."""
        rows: Tensor = self.anatomy.body.get_per_layer_inputs(ids_BT)  # type: ignore[operator]
        return rows

    def _settle(self) -> None:
        self.runner.settle()
        self.head.weights.settle()

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Rows of the embedding on the device, in the compute dtype, wherever its table is."""
        ids_BT = ids_BT.to(self.placement.device, non_blocking=True)
        return embedded(self.embedding, ids_BT).to(self.placement.compute_dtype)

    def body_forward(self, embedded_BTH: Tensor, position_ids_BT: Tensor, arguments: dict[str, Any]) -> Tensor:
        """transformers' own forward of the body over embeddings."""
        out = self.anatomy.body(
            inputs_embeds=embedded_BTH, position_ids=position_ids_BT, use_cache=False, return_dict=True, **arguments
        )
        return out.last_hidden_state
