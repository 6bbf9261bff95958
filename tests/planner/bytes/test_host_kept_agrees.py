"""What the plan says that layers send to host memory is what the runtime sends, block by block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drawplate.data.batches import cut_padded
from drawplate.layout.footprint import Mode
from drawplate.model.footprint.compiled import compiled_footprint
from drawplate.model.footprint.measure import Measured
from drawplate.model.layer.anatomy import build_anatomy
from drawplate.model.stream import host_activations
from drawplate.model.stream.host_activations import HostActivations
from drawplate.model.support.targets import lora_config
from drawplate.planner.bytes import host_kept
from drawplate.recipe import LoraSection
from tests.model.conftest import random_sequences, write_model
from tests.model.test_causal_lm import build

LEAST_BYTES, TOKENS, LAYER = 4096, 64, 1


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_plan_sends_what_the_runtime_sends(
    architecture: str, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (host_activations, host_kept):
        monkeypatch.setattr(module, "SENT_FROM_BYTES", LEAST_BYTES)
    monkeypatch.setattr(host_kept, "_SENT", {})
    checkpoint = write_model(tmp_path / "model", architecture)
    section = LoraSection(r=4, lora_alpha=8, lora_dropout=0.1)
    sent: list[int] = []
    original = HostActivations.send

    def watched(store: HostActivations, layer: int) -> None:
        if layer == LAYER:
            sent.extend(block.size for block in store._now.blocks[layer].values())
        original(store, layer)

    monkeypatch.setattr(HostActivations, "send", watched)
    model = build(checkpoint, section, activations=("host", "host", "keep", "keep"), compiled=compiled)
    batch = cut_padded(random_sequences([TOKENS // 2] * 2), 2, 4, 0)[0]
    model.sum_nats(batch, scale=0.01, dropout_seed=(3, 0))[0].backward()
    anatomy = build_anatomy(checkpoint.config)
    measured = Measured(anatomy, LAYER, lora_config(section, anatomy, "x", None), None)
    mode = Mode("cpu", "float32", compiled, "", False, True, False, "kept")
    part = measured(mode)
    if compiled:  # as on a GPU
        layer, cpu = measured.layer(mode), torch.device("cpu")
        part = compiled_footprint(measured.trial(layer, mode, cpu), cpu)
    hidden = TOKENS * anatomy.config.hidden_size * 4
    planned = [*host_kept.sent_blocks(part, TOKENS, 0, hidden).values()]
    assert len(sent) > 5, "or there is little to agree on"
    assert sent == planned, "in the same order too: by it the allocator finds room"
