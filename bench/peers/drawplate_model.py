"""Drawplate: the parts that a run uses, without the run's folder, journal and evaluation.

A setting's options are Placement's words, or `plan: True`: then the planner decides all that a user may leave open, for
the case's own documents and the setting's budget (into how many micro-batches a padded step is cut, too: gradients are
the same), and the model is loaded anew for each case. `keep: fit` beside an
explicit placement keeps as many layers' activations as fit (fit.py).
"""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.peers.cases import Case, Setting
from bench.peers.fit import fit_kept_layers
from bench.peers.material import load_lora
from bench.peers.memory import cap_allocator
from bench.peers.stepping import Documents, Scale
from drawplate.data.batches import Batch, cut_packed, cut_padded
from drawplate.model.base.precision import Storage
from drawplate.model.base.weights import open_checkpoint
from drawplate.model.causal_lm import CausalLM
from drawplate.model.device_batch import ShapeBounds
from drawplate.model.load.assemble import assemble
from drawplate.model.placement import Placement, placement_of
from drawplate.model.support.targets import lora_config
from drawplate.planner.situation import CorpusShape
from drawplate.recipe import LoraSection, load_recipe
from drawplate.records import Plan, Sequence
from drawplate.run.planning import plan_for_lengths

PAD_MULTIPLE = 16


class DrawplatePeer:
    """A CausalLM in a placement; `Peer` of stepping.py."""

    fp16 = False

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.folder, self.setting = folder, setting
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.section = LoraSection(**load_lora(folder), lora_dropout=setting.dropout)
        self.checkpoint = open_checkpoint(recipe_of(folder, setting, None).model)
        self.adapter: dict[str, torch.nn.Parameter] = {}
        self._calls, self._packed_tokens, self._planned_for = 0, 0, ""
        self._case = ""
        self._rows: int | None = None
        if not setting.options.get("plan"):
            self._assemble(explicit_placement(setting, self.device))

    def _assemble(self, placement: Placement) -> None:
        self.model: CausalLM = assemble(
            self.checkpoint, placement, lambda a: lora_config(self.section, a, "random", None), seed=0
        )
        self.adapter = self.model.adapter.named_tensors()

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.model.anatomy.layers)

    def keep(self, count: int) -> None:
        """Keep the activations of the last `count` layers and recompute the others."""
        self._forget_graphs()
        self.model.set_policies(["recompute"] * (self.layers - count) + ["keep"] * count)

    def enter(self, case: Case) -> None:
        """Before steps on a case, which is a run of its own: shapes of another do not widen its rows."""
        if case.name != self._case and hasattr(self, "model"):
            self.model._bounds["training"] = ShapeBounds()
        self._case = case.name

    def prepare(self, case: Case, two_steps: Any) -> dict[str, Any]:
        """Plan or fit for a case; what was decided."""
        if self.setting.options.get("keep") == "fit":
            kept = fit_kept_layers(self, two_steps, lambda: cap_allocator(int((self.setting.budget_gib or 0) * 2**30)))
            return {"decided": {"kept_layers": kept}}
        if not self.setting.options.get("plan") or self._planned_for == case.name:
            return {}
        self.__dict__.pop("model", None)
        self.adapter = {}
        torch._dynamo.reset()  # its limit of compilations is meant for one run
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        chosen = self._plan(case)
        self._assemble(placement_of(chosen, self.device))
        self._planned_for, self._packed_tokens = case.name, chosen.micro_batch_tokens if chosen.packing else 0
        self._rows = chosen.micro_batch_sequences
        return {"decided": words_of(chosen)}

    def _plan(self, case: Case) -> Plan:
        from drawplate.model.layer.anatomy import build_anatomy

        lengths = tuple(n for group in case.micro_batches for n in group)
        recipe = recipe_of(self.folder, self.setting, case)
        anatomy = build_anatomy(self.checkpoint.config)
        return plan_for_lengths(recipe, self.checkpoint, anatomy, CorpusShape(lengths=lengths), max(lengths))

    def zero_gradients(self) -> None:
        """Before the first micro-batch of a step; captured steps need gradients that stay where they are."""
        if hasattr(self.model.adapter, "zero_gradients"):
            self.model.adapter.zero_gradients()
        else:
            for parameter in self.adapter.values():
                parameter.grad = None

    def rest(self) -> None:
        """Between measurements: captured steps would hold memory."""
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        if hasattr(self.model, "forget_graphs"):
            self.model.forget_graphs()

    def backward(
        self, documents: Documents, share: float, *, dropout: float, packed_tokens: int, scale: Scale
    ) -> Tensor:
        """As in Peer.

        Raises:
            ValueError: a dropout other than the adapter's or none.
        """
        if dropout not in (0.0, self.setting.dropout):
            raise ValueError(f"was loaded with dropout {self.setting.dropout:g}")
        self._calls += 1
        batches = cut(documents, self._packed_tokens or packed_tokens, self._rows)
        counted = sum(batch.counted_tokens for batch in batches)
        nats = torch.zeros((), device=self.device)
        seed = (0, self._calls) if dropout else None
        for batch in batches:
            nats = nats + self._add_gradients(batch, share * float(scale) / counted, seed)
        return nats / counted

    def _add_gradients(self, batch: Batch, scale: float, seed: tuple[int, int] | None) -> Tensor:
        if hasattr(self.model, "add_gradients"):
            added: Tensor = self.model.add_gradients(batch, scale=scale, dropout_seed=seed)
            return added
        loss, nats_N = self.model.sum_nats(batch, scale=scale, dropout_seed=seed)
        loss.backward()
        return nats_N.sum()


def explicit_placement(setting: Setting, device: torch.device) -> Placement:
    """A setting's options as a placement; `graphs` only where this version of Drawplate has them."""
    options: dict[str, Any] = {"graphs": True, **setting.options}
    known = {field.name for field in dataclasses.fields(Placement)}
    if "graphs" not in known:
        options.pop("graphs")
    if options.pop("keep", ""):
        options["activations"] = "recompute"
    return Placement(
        device=device,
        storage=Storage(options.pop("precision", "bf16")),
        compute_dtype=getattr(torch, options.pop("compute", "bfloat16")),
        compiled=options.pop("compiled", device.type == "cuda"),
        **options,
    )


def recipe_of(folder: Path, setting: Setting, case: Case | None) -> Any:
    """The recipe that a user would write for a case and a budget, everything else left open."""
    values: dict[str, Any] = {
        "model": {"name_or_path": str(folder)},
        "data": {"files": str(folder)},
        "lora": {**load_lora(folder), "lora_dropout": setting.dropout},
        "train": {"bf16": True},
        "quantization": {k: v for k, v in setting.options.items() if k == "precision"},
        "memory": {"vram": f"{setting.budget_gib:g}GiB"} if setting.budget_gib else {},
    }
    if case is not None:
        count = sum(map(len, case.micro_batches))
        values["data"] |= {"max_length": max(map(max, case.micro_batches)), "packing": bool(case.packed_tokens)}
        values["train"] |= (
            {"effective_batch_size": count}
            if case.packed_tokens or len(case.micro_batches) == 1
            else {
                "per_device_train_batch_size": len(case.micro_batches[0]),
                "gradient_accumulation_steps": len(case.micro_batches),
            }
        )
    return load_recipe(values)


def words_of(chosen: Plan) -> dict[str, Any]:
    """What of a plan is worth writing beside a speed."""
    names = ("precision", "dequantized_layers", "device_layers", "host_layers", "head_rows", "embedding")
    names = (
        *names,
        "kept_layers",
        "host_kept_layers",
        "policy",
        "compiled",
        "dequantize",
        "micro_batch_tokens",
        "micro_batch_sequences",
        "graphs",
    )
    words = {name: getattr(chosen, name) for name in names}
    predicted = max((sum(x.bytes for x in p.lines if x.where == "device") for p in chosen.phases), default=None)
    return {**words, "predicted_tokens_per_second": chosen.times and chosen.times.tokens_per_second, "bytes": predicted}


def cut(documents: Documents, packed_tokens: int, rows: int | None = None) -> list[Batch]:
    """Drawplate's own micro-batches: padded, so many rows each (None: one of all), or packed rows."""
    sequences = [
        Sequence(
            index=i,
            document=str(i),
            input_ids=ids.astype(np.int32),
            counted=np.ones(len(ids), bool),
            text_bytes=len(ids),
        )
        for i, ids in enumerate(documents)
    ]
    if packed_tokens:
        return cut_packed(sequences, packed_tokens, PAD_MULTIPLE, 0)
    return cut_padded(sequences, rows or len(sequences), PAD_MULTIPLE, 0)


def load(folder: Path, setting: Setting) -> DrawplatePeer:
    """The model in its placement, with a fresh adapter; with a plan it is loaded when the case is known."""
    return DrawplatePeer(folder, setting)
