"""What bf16 loses of an adapter's first steps, by where its output is added to the frozen product's.

    python examples/fetch_demo.py && python bench/small_updates.py OUT.json

A frozen product that is already rounded to bf16 lies on that grid; an adapter whose output is smaller than half a step
of the grid vanishes when it is added, and a small update of a good model is that small. Added before the product is
rounded, as Drawplate does (model/layer/frozen_product.py), it moves the rounding instead. SmolLM2-135M's real weights,
some of the demo's documents, LoRA r=16 on all linear layers; AdamW takes its steps in fp32, and each adapter on the way
is measured in fp32, in bf16 with its output added after rounding (as PEFT does), and in bf16 by Drawplate's own layers.
Left out: dropout, 4-bit weights, the gradients' own rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from bench.about import about  # noqa: E402
from drawplate.data.batches import cut_padded  # noqa: E402
from drawplate.model.base.precision import Storage  # noqa: E402
from drawplate.model.causal_lm import CausalLM  # noqa: E402
from drawplate.model.load.assemble import assemble  # noqa: E402
from drawplate.model.placement import Placement  # noqa: E402
from drawplate.model.support.targets import lora_config  # noqa: E402
from drawplate.recipe import LoraSection  # noqa: E402

RANK, SCALE, DOCUMENTS = 16, 2.0, 6
Adapter = dict[str, tuple[Tensor, Tensor]]


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The decoder's linear layers by name."""
    return {name: m for name, m in model.get_submodule("model.layers").named_modules() if isinstance(m, nn.Linear)}


def put(model: nn.Module, adapter: Adapter) -> None:
    """Every linear layer adds its adapter's output to its own product, which is rounded already."""
    for name, linear in linears_of(model).items():

        def forward(x: Tensor, name: str = name, linear: nn.Linear = linear) -> Tensor:
            a, b = (factor.to(x.dtype) for factor in adapter[name])
            return F.linear(x, linear.weight) + SCALE * (x @ a.T) @ b.T

        linear.forward = forward  # type: ignore[method-assign]


def nats_of(model: Any, documents: list[list[int]]) -> Tensor:
    """Mean over the tokens; logits in float32 whatever the model's dtype."""
    total, count = torch.zeros(()), 0
    for ids in documents:
        tokens = torch.tensor([ids])
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[0, :-1]
        logits = F.linear(hidden.float(), model.lm_head.weight.float())
        total, count = total + F.cross_entropy(logits, tokens[0, 1:], reduction="sum"), count + len(ids) - 1
    return total / count


def drawplate_model(prepared: Any) -> CausalLM:
    """The base model in Drawplate's layers in bf16, with an adapter like the others'."""
    section = LoraSection(r=RANK, lora_alpha=RANK * SCALE, lora_dropout=0.0, target_modules="all-linear")
    placement = Placement(storage=Storage("bf16"), compute_dtype=torch.bfloat16)

    def config(anatomy: Any) -> Any:
        return lora_config(section, anatomy, prepared.checkpoint.name, None)

    return assemble(prepared.checkpoint, placement, config, seed=0)


@torch.no_grad()
def nats_by_drawplate(model: CausalLM, adapter: Adapter, sequences: list[Any]) -> float:
    """Mean over the tokens, each document in a row of its own."""
    for layer, tensors in enumerate(model.adapter.layers):
        for name, trained in tensors.items():
            linear, _, which = name.rpartition(".")
            trained.copy_(adapter[f"{layer}.{linear}"][which == "lora_B"])
    total = count = 0.0
    for batch in cut_padded(sequences, 1, 8, 0):
        total, count = total + model.sum_nats(batch)[0].item(), count + batch.counted_tokens
    return total / count


def first_steps(prepared: Any, rate: float, steps: int) -> list[dict[str, float]]:
    """Nats after 0, 1, ... steps in fp32, and of the same adapters in bf16, added after and before rounding."""
    from transformers import AutoModelForCausalLM

    folder, sequences = prepared.checkpoint.folder, prepared.train.sequences[:DOCUMENTS]
    documents = [sequence.input_ids.tolist() for sequence in sequences]
    ours = drawplate_model(prepared)

    torch.manual_seed(0)
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)
        for dtype in (torch.float32, torch.bfloat16)
    )
    adapter: Adapter = {}
    for name, linear in linears_of(exact).items():
        bound = 1 / math.sqrt(linear.in_features)
        a = torch.empty(RANK, linear.in_features).uniform_(-bound, bound)
        adapter[name] = (a.requires_grad_(), torch.zeros(linear.out_features, RANK, requires_grad=True))
    optimizer = torch.optim.AdamW([factor for pair in adapter.values() for factor in pair], lr=rate, weight_decay=0.0)
    put(exact, adapter)
    put(rounded, adapter)
    points = []
    for step in range(steps + 1):
        loss = nats_of(exact, documents)
        point = {"step": step, "fp32": loss.item()}
        with torch.no_grad():
            point["bf16, added after rounding"] = nats_of(rounded, documents).item()
        point["bf16, Drawplate"] = nats_by_drawplate(ours, adapter, sequences)
        points.append(point)
        if step < steps:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return points


def main() -> None:
    """Write the JSON after each rate, print a line a point."""
    from drawplate.recipe import load_recipe
    from drawplate.run.prepare import prepare

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 5e-4, 1.2e-3])
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()
    prepared = prepare(load_recipe(ROOT / "examples" / "climate-demo.yaml"))
    results: list[dict[str, Any]] = []
    for rate in given.rates:
        results.append({"rate": rate, "nats": first_steps(prepared, rate, given.steps)})
        for point in results[-1]["nats"]:
            print(rate, point, flush=True)
        given.out.write_text(json.dumps({**about(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
