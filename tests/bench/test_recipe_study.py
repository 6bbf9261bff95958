"""The study trains many adapters at once; each must learn as Drawplate's own loop teaches it alone."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.recipe_study import Adapters, Base, Group, Variant, score, train_group
from drawplate.data.batches import Cutting
from drawplate.evaluation.score import score_documents, total
from drawplate.recipe import LoraSection, TrainSection
from drawplate.records import Sequence
from drawplate.train.loop import train
from drawplate.train.task import Schedule, TrainState, TrainTask
from tests.tiny import Notes, tiny_model, write_base

VARIANTS = (
    Variant(rate=2e-2, r=4),
    Variant(rate=1e-2, r=4, loraplus=4.0, warmup=0.3),
    Variant(rate=2e-2, r=2, scale=3.0, schedule="linear", targets="qv"),
)


def windows(count: int, seed: int) -> list[Sequence]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        length = int(rng.integers(5, 40))
        counted = np.ones(length, dtype=bool)
        counted[0] = False
        ids = rng.integers(3, 300, length).astype(np.int32)
        made.append(Sequence(index=i, document=f"d{i}", input_ids=ids, counted=counted, text_bytes=length))
    return made


def alone(base: Path, variant: Variant, texts: tuple[list[Sequence], list[Sequence]], group: Group, start) -> float:
    """Held-out nats after Drawplate's own loop, from the same A matrices."""
    targets = ["q_proj", "v_proj"] if variant.targets == "qv" else "all-linear"
    model = tiny_model(base, LoraSection(r=variant.r, lora_alpha=variant.scale * variant.r, target_modules=targets))
    state = model.adapter.state()
    for name in state:
        path = name.removeprefix("base_model.model.model.layers.").removesuffix(".lora_A.weight")
        if name.endswith("lora_A.weight"):
            state[name] = start[path][:, : variant.r].T.contiguous()
    model.adapter.load_state(state, "the study's start")
    train_windows, heldout = texts
    batch = max(1, round(group.step_tokens * len(train_windows) / sum(map(len, train_windows))))
    steps = -(-len(train_windows) // batch) * group.epochs
    schedule = Schedule(steps=steps, peak_rate=variant.rate, kind=variant.schedule, warmup_ratio=variant.warmup)
    task = TrainTask(
        model=model,
        sequences=train_windows,
        cutting=Cutting(packing=True, tokens=256),
        effective_batch=batch,
        schedule=schedule,
        section=TrainSection(seed=group.seed),
        loraplus_lr_ratio=variant.loraplus,
    )
    train(task, Notes(), TrainState())
    return total(score_documents(model, heldout, Cutting(packing=True, tokens=256)(heldout))).nats


def test_each_recipe_of_a_group_learns_as_if_it_were_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.recipe_study.ROW_TOKENS", 300)
    base = write_base(tmp_path / "base")
    texts = windows(20, 0), windows(6, 1)
    group = Group(corpus="climate", variants=VARIANTS, precision="fp32", step_tokens=100, epochs=2, seed=3)
    result = train_group(Base(base, "cpu"), group, {"climate": texts}, math.inf)
    together = result["epoch_nats"][-1]["climate"]
    generator, start = torch.Generator().manual_seed(3), {}
    plain = Base(base, "cpu")
    for name, linear in plain.model.model.layers.named_modules():
        if isinstance(linear, torch.nn.Linear):
            bound = 1 / math.sqrt(linear.in_features)
            start[name] = torch.empty(4, linear.in_features).uniform_(-bound, bound, generator=generator).T
    expected = [alone(base, variant, texts, group, start) for variant in VARIANTS]
    assert result["steps"] > 6
    assert together == pytest.approx(expected, rel=1e-4)
    assert abs(together[0] / result["before_nats"]["climate"] - 1) > 1e-3, "something was learnt"
    assert len({round(x, 1) for x in together}) == 3, "the recipes differ"


def test_a_start_from_the_quantization_error_repairs_it_and_its_difference_leaves_it_out(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.recipe_study.ROW_TOKENS", 300)
    base = Base(write_base(tmp_path / "base"), "cpu")
    texts = windows(12, 0)
    plain = score(base.model, texts)[0].sum()
    base.in_precision("nf4")
    stored = score(base.model, texts)[0].sum()
    base.watch_inputs(texts)
    variants = tuple(Variant(start=start, r=r) for start in ("error", "weighted") for r in (8, 64))
    adapters = Adapters(base, Group(corpus="climate", variants=variants))
    error = base.plain["0.mlp.up_proj"] - base.linears["0.mlp.up_proj"].weight
    left, right = base.error_factors("error")["0.mlp.up_proj"]
    left_over = float((left[:, :8] @ right[:, :8].T - error).norm())
    assert left_over == pytest.approx(float(torch.linalg.svdvals(error)[8:].norm()), rel=1e-3)
    repaired = base.error_factors("weighted")["0.mlp.up_proj"]
    assert torch.allclose(repaired[0] @ repaired[1].T, error, atol=1e-5)
    adapters.install()
    nats = score(base.model, texts, adapters)[0].sum(axis=1)
    assert nats[1] == pytest.approx(plain, rel=1e-5)
    assert nats[3] == pytest.approx(plain, rel=1e-5)
    assert abs(stored / plain - 1) > 1e-4
    assert base.score_plain(adapters, texts) == pytest.approx([plain] * 4, rel=1e-6), "nothing was learnt yet"
