"""Another model than the one that was meant (rows 70 to 72)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drawplate.errors import UserError
from drawplate.model.base.adapter_base import AdapterBase, other_base
from drawplate.model.base.adapter_config import read_adapter_config
from drawplate.model.base.weights import open_checkpoint
from drawplate.recipe import ModelSection
from tests.faults.rows import shows
from tests.tiny import open_base, tiny_model

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def test_row_70_an_adapter_that_asks_for_more_is_refused_by_its_key(tmp_path: Path) -> None:
    for which, keys in enumerate(({"use_dora": True}, {"init_lora_weights": "pissa"})):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**PLAIN, **keys}))
        with pytest.raises(UserError) as error:
            read_adapter_config(tmp_path)
        shows(70, str(error.value), which)
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    assert read_adapter_config(tmp_path).r == 4, "the control"


def test_row_71_files_of_another_model_than_the_configuration_says(small: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(small / "base", base)
    weights, values = base / "model.safetensors", json.loads((base / "config.json").read_text())
    original = load_file(weights)
    save_file({**original, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, weights, {"format": "pt"})
    with pytest.raises(UserError) as error:
        tiny_model(base)
    shows(71, str(error.value), 0)
    save_file(original, weights, {"format": "pt"})
    (base / "config.json").write_text(json.dumps({**values, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError) as error:
        open_base(base)
    shows(71, str(error.value), 1)
    (base / "config.json").write_text(json.dumps(values))
    assert tiny_model(base), "the control"


def test_row_72_an_adapter_on_another_base_than_its_own(small: Path) -> None:
    checkpoint = open_checkpoint(ModelSection(name_or_path=str(small / "base")))
    own = AdapterBase(name="mine", sha256=checkpoint.sha256())
    assert other_base("a", own, "mine", checkpoint, []) == "", "the control"
    shows(72, other_base("a", AdapterBase(name="mine", sha256="0" * 64), "mine", checkpoint, []))
