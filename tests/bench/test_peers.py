from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig

from bench.peers import drawplate_model, huggingface, material, worker
from bench.peers.cases import REFERENCE, Setting, documents, parse_case
from bench.peers.entries import gradient_error
from bench.peers.gate import Curve, judge
from bench.peers.stepping import Steps, set_adapter, take_steps

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")

OWN = Setting(
    system="drawplate", name="fp32", dropout=0.0, options={"precision": "fp32", "compute": "float32", "compiled": False}
)


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("material")
    shutil.copytree(base, made, dirs_exist_ok=True)
    material.save_start(made, AutoConfig.from_pretrained(made), material.MISSION_LORA)
    return made


def steps_of(peer: object, folder: Path, case_name: str, out: Path) -> Steps:
    case = parse_case(case_name)
    vocab = AutoConfig.from_pretrained(folder).vocab_size
    steps = [documents(case, i, vocab) for i in range(3)]
    set_adapter(peer, material.load_start(folder))
    return take_steps(
        peer, steps, dropout=0.0, packed_tokens=case.packed_tokens, gradient=out / "gradient-curve.safetensors"
    )


@pytest.mark.parametrize("case", ["2x16", "climate-padded-2-4", "climate-packed-512-4"])
def test_drawplate_and_peft_take_the_same_steps(folder: Path, tmp_path: Path, case: str) -> None:
    reference = steps_of(huggingface.load(folder, REFERENCE), folder, case, tmp_path / "reference")
    peer = drawplate_model.load(folder, OWN)
    own = steps_of(peer, folder, case, tmp_path / "own")
    error = gradient_error(*(tmp_path / name / "gradient-curve.safetensors" for name in ("own", "reference")))
    assert own.losses == pytest.approx(reference.losses, abs=2e-4)
    assert error is not None
    assert error < 1e-3
    assert min(own.gradient_norms) > 0
    assert len(own.seconds) == 2


def test_the_gate_refuses_a_peer_whose_gradients_are_spoilt(folder: Path, tmp_path: Path) -> None:
    """The negative control on real steps: half of the trained tensors get no gradient."""
    reference = steps_of(huggingface.load(folder, REFERENCE), folder, "2x16", tmp_path / "reference")
    peer = drawplate_model.load(folder, OWN)
    for name, tensor in peer.adapter.items():
        if "v_proj" in name:
            tensor.register_hook(lambda grad: grad * 0)
    steps_of(peer, folder, "2x16", tmp_path / "own")
    error = gradient_error(*(tmp_path / name / "gradient-curve.safetensors" for name in ("own", "reference")))
    true = Curve(losses=reference.losses, gradient_norms=reference.gradient_norms, gradient_error=0.1)
    spoilt = Curve(losses=reference.losses, gradient_norms=reference.gradient_norms, gradient_error=error)
    assert judge(true, true, true).passed
    assert "gradient" in judge(spoilt, true, true).reason


def test_a_system_that_trains_other_tensors_is_refused(folder: Path) -> None:
    start = material.load_start(folder)
    start.pop(next(iter(start)))
    with pytest.raises(ValueError, match="other tensors"):
        set_adapter(drawplate_model.load(folder, OWN), start)


def test_a_timed_case_is_a_run_of_its_own(folder: Path, tmp_path: Path) -> None:
    """Rows are no wider than the case's own, whatever other case came before: packed rows are much wider."""
    doer = worker.Worker({"setting": dataclasses.asdict(OWN), "folder": str(folder), "out": str(tmp_path)})
    doer.imports()
    doer.load()
    padded, packed = "climate-padded-2-4", "climate-packed-512-4"
    for case in (padded, packed):
        doer.warm(case)
    bounds = doer.peer.model._bounds
    bounds["training"].width = 512  # as compiled steps would have left it
    doer.time(packed, "1")
    assert bounds["training"].width == 512
    assert len(doer.time(padded, "1")["step_seconds"]) == 1
    assert bounds["training"].width < 512
