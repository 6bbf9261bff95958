"""`prepare_model`'s module by itself, inside transformers' Trainer, inside TRL's SFTTrainer, and generating."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments
from transformers.data import DataCollatorWithFlattening

import drawplate
from drawplate.data.batches import cut_padded
from drawplate.errors import IntegrityError, UsageError
from drawplate.integrations.trainer_model import STATE_NAME, DrawplateForCausalLM
from drawplate.model.base.precision import Storage
from drawplate.model.base.weights import Checkpoint
from drawplate.model.load.assemble import assemble
from drawplate.model.placement import Placement
from drawplate.model.support.targets import lora_config
from drawplate.planner.advise import advised_adapter
from drawplate.recipe import USUAL_RANK, LoraSection, MemorySection
from tests.model.conftest import VOCAB, random_sequences, write_model
from tests.tiny import open_base, texts, write_base

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

LORA = LoraSection(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
RESIDENT: dict[str, Any] = {"storage": Storage("fp32"), "compute_dtype": torch.float32}
STREAMED = {**RESIDENT, "weights": "host", "activations": "recompute", "head_rows": 40, "poison": True}
PLACEMENTS = pytest.mark.parametrize("placement", [RESIDENT, STREAMED], ids=["resident", "streamed"])
CHECKPOINTING = (
    "activation_checkpointing"  # the name from transformers 5.2x on
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_model(tmp_path_factory.mktemp("base") / "llama", "llama")


def prepared(checkpoint: Checkpoint, lora: LoraSection = LORA, seed: int = 0, **placement: Any) -> DrawplateForCausalLM:
    """What `prepare_model` returns, with a placement that only tests ask for."""
    model = assemble(
        checkpoint,
        Placement(**(placement or RESIDENT)),
        lambda anatomy: lora_config(lora, anatomy, str(checkpoint.folder), None),
        seed=seed,
    )
    return DrawplateForCausalLM(model, checkpoint, seed=seed)


def base_model(checkpoint: Checkpoint) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def with_noise(model: DrawplateForCausalLM) -> DrawplateForCausalLM:
    """A trained adapter: at the start its B matrices are zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def peft_twin(checkpoint: Checkpoint, model: DrawplateForCausalLM, folder: Path, trainable: bool = False) -> PeftModel:
    """PEFT's own model with the same adapter."""
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(base_model(checkpoint), folder, is_trainable=trainable)


def padded_inputs(lengths: tuple[int, ...] = (9, 5, 12), seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.stack([(torch.arange(max(lengths)) < length).long() for length in lengths])
    ids = torch.randint(3, VOCAB, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def rows(count: int, length: int = 12) -> list[dict[str, list[int]]]:
    """Texts that repeat a short phrase, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1)
    phrases = torch.randint(3, VOCAB, (2, 4), generator=generator)
    ids = [phrases[i % 2].repeat(length // 4).tolist() for i in range(count)]
    return [{"input_ids": row, "attention_mask": [1] * length, "labels": row} for row in ids]


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    options = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 2e-2,
        "save_strategy": "no",
        "logging_steps": 1,
        **options,
    }
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows(16), eval_dataset=rows(4))


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


# --- by itself -------------------------------------------------------------------------------------------------------


def test_its_parameters_are_the_adapters_under_pefts_names(base: Checkpoint, tmp_path: Path) -> None:
    model = prepared(base)
    twin = peft_twin(base, model, tmp_path)
    in_peft = {n.replace(".default", ""): p.shape for n, p in twin.named_parameters() if "lora_" in n}
    assert {name: p.shape for name, p in model.named_parameters()} == in_peft
    assert model.state_dict().keys() == in_peft.keys()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    trained, total = model.get_nb_trainable_parameters()
    assert total - trained == sum(p.numel() for p in base_model(base).parameters())


@PLACEMENTS
def test_loss_and_gradients_are_those_of_peft(base: Checkpoint, tmp_path: Path, placement: dict[str, Any]) -> None:
    model = with_noise(prepared(base, **placement))
    twin = peft_twin(base, model, tmp_path, trainable=True)
    for options in ({}, {"num_items_in_batch": torch.tensor(41)}):
        ours, theirs = (m(**padded_inputs(), **options) for m in (model, twin))
        assert ours.logits is None
        torch.testing.assert_close(ours.loss, theirs.loss)
        ours.loss.backward()
        theirs.loss.backward()
    own = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(own[name.replace(".default", "")].grad, parameter.grad, rtol=1e-4, atol=1e-6)


@PLACEMENTS
@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere"])
def test_logits_and_their_gradients_are_those_of_peft(tmp_path: Path, name: str, placement: dict[str, Any]) -> None:
    checkpoint = write_model(tmp_path / name, name)
    model = with_noise(prepared(checkpoint, **placement))
    twin = peft_twin(checkpoint, model, tmp_path / "adapter", trainable=True)
    inputs = {"input_ids": padded_inputs((9, 9))["input_ids"]}
    ours, theirs = model(**inputs).logits, twin(**inputs).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, ours[:, -2:])
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    for logits in (ours, theirs):
        (logits * weights).sum().backward()
    own = dict(model.named_parameters())
    for parameter_name, parameter in twin.named_parameters():
        if "lora_" in parameter_name:
            torch.testing.assert_close(
                own[parameter_name.replace(".default", "")].grad, parameter.grad, rtol=1e-3, atol=1e-3
            )


@PLACEMENTS
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_documents_of_a_packed_row_do_not_see_each_other(name: str, tmp_path: Path, placement: dict[str, Any]) -> None:
    checkpoint = write_model(tmp_path / name, name)
    model = prepared(checkpoint, **placement)
    inputs = padded_inputs((9, 1, 12))
    lengths = inputs["attention_mask"].sum(1).tolist()
    examples = [{"input_ids": row[:n].tolist()} for row, n in zip(inputs["input_ids"], lengths, strict=True)]
    packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(examples)
    with torch.no_grad():
        want = model(**inputs).loss
        torch.testing.assert_close(model(**packed).loss, want)
        without_positions = {key: value for key, value in packed.items() if key != "position_ids"}
        torch.testing.assert_close(model(**without_positions).loss, want)
        twice = {key: packed[key].repeat(2, 1) for key in ("input_ids", "labels", "position_ids")}
        torch.testing.assert_close(model(**twice).loss, want)
        mixed_up = model(input_ids=packed["input_ids"], labels=packed["labels"]).loss
        assert abs(mixed_up - want) > 1e-2, "without the positions it is one document"
        logits = model(input_ids=packed["input_ids"], position_ids=packed["position_ids"]).logits
        torch.testing.assert_close(logits[0, :9], model(inputs["input_ids"][:1, :9]).logits[0], rtol=1e-4, atol=1e-4)


def test_positions_of_right_padding_do_not_matter(base: Checkpoint) -> None:
    model, inputs = prepared(base), padded_inputs()
    positions = (inputs["attention_mask"].cumsum(1) - 1).masked_fill(inputs["attention_mask"] == 0, 1)
    assert model(**inputs, position_ids=positions).loss == model(**inputs).loss


def test_inputs_that_cannot_be_meant_are_refused(base: Checkpoint) -> None:
    model, inputs = prepared(base), padded_inputs()
    ids = inputs["input_ids"]
    with pytest.raises(ValueError, match="to the left of tokens"):
        model(**{**inputs, "attention_mask": inputs["attention_mask"].flip(1)})
    with pytest.raises(ValueError, match="position_ids that start again"):
        model(ids, attention_mask=inputs["attention_mask"] * 2)
    with pytest.raises(ValueError, match=r"position_ids .* do not fit"):
        model(ids, position_ids=torch.zeros(3, *ids.shape, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels .* do not fit"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match="rows, tokens"):
        model(ids[0])
    with pytest.raises(ValueError, match="no past_key_values"):
        model(ids, past_key_values=DynamicCache())


def test_nothing_to_predict_is_a_loss_of_zero_that_can_be_differentiated(base: Checkpoint) -> None:
    model, inputs = prepared(base), padded_inputs()
    loss = model(inputs["input_ids"], labels=torch.full_like(inputs["input_ids"], -100)).loss
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in model.parameters())


def test_dropout_differs_from_forward_to_forward_and_is_the_same_in_recomputation(base: Checkpoint) -> None:
    lora = LORA.model_copy(update={"lora_dropout": 0.3})
    found, gradients = [], []
    for placement in ({**RESIDENT, "head_rows": 40}, STREAMED):
        model = with_noise(prepared(base, lora, **placement))
        found.append([float(model.eval()(**padded_inputs()).loss.detach())])
        for _ in range(3):
            loss = model.train()(**padded_inputs()).loss
            loss.backward()
            found[-1].append(float(loss.detach()))
        found[-1].append(float(model.eval()(**padded_inputs()).loss.detach()))
        gradients.append([p.grad for p in model.parameters()])
    assert found[0] == found[1]
    assert found[0][0] == found[0][-1]
    assert len(set(found[0])) == 4
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_an_adapter_that_is_disabled_leaves_the_base_model(base: Checkpoint) -> None:
    model, inputs = with_noise(prepared(base, **STREAMED)), padded_inputs()
    want, adapted = base_model(base)(**inputs).loss, model(**inputs).loss
    with model.disable_adapter():
        torch.testing.assert_close(model(**inputs).loss, want)
    assert abs(adapted - want) > 1e-3
    assert model(**inputs).loss == adapted


def test_gradient_checkpointing_sets_the_layers_policies(base: Checkpoint) -> None:
    model = prepared(base)
    policies = model.causal_lm.runner
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert policies.policies == ("recompute",) * 4
    assert model.is_gradient_checkpointing
    model.activation_checkpointing_enable(every_n_layers=2, offload=True)
    assert policies.policies == ("offload", "keep", "offload", "keep")
    model.activation_checkpointing_disable()
    assert policies.policies == ("keep",) * 4


def test_it_stays_where_the_plan_put_it(base: Checkpoint) -> None:
    model, inputs = prepared(base), padded_inputs()
    loss = model(**inputs).loss
    model.half().to("meta")
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", torch.float32)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(**inputs).loss == loss
    with pytest.raises(UsageError, match="one process"):
        model._replicate_for_data_parallel()


def test_a_saved_adapter_is_loaded_again_and_another_one_refused(base: Checkpoint, tmp_path: Path) -> None:
    first, second = with_noise(prepared(base)), prepared(base, seed=1)
    first.train()(**padded_inputs())
    first.save_pretrained(tmp_path / "not-main", is_main_process=False)
    assert not (tmp_path / "not-main").exists()
    first.save_pretrained(tmp_path)
    second.load_adapter(tmp_path)
    assert second.eval()(**padded_inputs()).loss == first.eval()(**padded_inputs()).loss
    assert second.forwards == first.forwards == 1
    with pytest.raises(UsageError, match="lora_alpha 8"):
        prepared(base, LORA.model_copy(update={"lora_alpha": 16.0})).load_adapter(tmp_path)
    (tmp_path / STATE_NAME).write_text("{}")
    with pytest.raises(IntegrityError, match=STATE_NAME):
        second.load_adapter(tmp_path)
    with pytest.raises(UsageError, match="prepare_model"):
        DrawplateForCausalLM.from_pretrained(tmp_path)


# --- prepare_model ---------------------------------------------------------------------------------------------------


def test_prepare_model_takes_the_parts_of_a_recipe(base: Checkpoint) -> None:
    model = drawplate.prepare_model(
        str(base.folder),
        model={"device_map": "cpu"},
        quantization={"precision": "nf4", "bnb_4bit_compute_dtype": "float32"},
        lora=LoraSection(r=2, target_modules=["q_proj"]),
        memory=MemorySection(weights="host", activations="offload"),
        train={"gradient_checkpointing": True},
        seed=3,
    )
    placement = model.causal_lm.placement
    assert (placement.storage.precision, placement.weights, placement.activations) == ("nf4", "host", "offload")
    assert (model.seed, model.peft_config["default"].r, len(list(model.parameters()))) == (3, 2, 8)
    again = drawplate.prepare_model(str(base.folder), lora={"r": 2, "target_modules": ["q_proj"]}, train={"seed": 3})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert model(**padded_inputs()).loss.isfinite()


def test_prepare_model_warns_of_weight_files_that_it_leaves_out(base: Checkpoint, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base.folder, tmp_path / "copy"))
    shutil.copy(copy / "model.safetensors", copy / "old.safetensors")
    with pytest.warns(UserWarning, match=r"model\.safetensors is read; left out: old\.safetensors"):
        drawplate.prepare_model(str(copy), model={"device_map": "cpu"})


def test_prepare_model_takes_the_rank_that_a_run_would(base: Checkpoint) -> None:
    model = drawplate.prepare_model(str(base.folder), model={"device_map": "cpu"}, lora={"target_modules": ["q_proj"]})
    advised, _ = advised_adapter(LoraSection(), hidden=64)
    assert (model.peft_config["default"].r, model.peft_config["default"].lora_alpha) == (advised.r, advised.lora_alpha)
    assert advised.r != USUAL_RANK, "a small model takes another"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": {"rnk": 8}}, r"unknown key lora.rnk"),
        ({"quantization": {"load_in_4bits": True}}, r"did you mean quantization.load_in_4bit\?"),
        ({"lora": {"r": 0}}, "lora.r"),
        ({"lora": {"target_modules": ["query"]}}, "no linear layer is called query"),
        ({"train": {"gradient_checkpointing": False}, "memory": {"activations": "offload"}}, "asks for recomputation"),
    ],
)
def test_prepare_model_checks_its_keys(base: Checkpoint, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        drawplate.prepare_model(str(base.folder), **sections)


# --- transformers.Trainer --------------------------------------------------------------------------------------------


@PLACEMENTS
def test_inside_the_trainer_it_learns_what_a_peft_model_learns(
    base: Checkpoint, tmp_path: Path, placement: dict[str, Any]
) -> None:
    model = prepared(base, **placement)
    twin = peft_twin(base, model, tmp_path / "start", trainable=True)
    runs = [trainer(m, tmp_path / "run", gradient_accumulation_steps=2) for m in (model, twin)]
    for run in runs:
        run.train()
    ours, theirs = map(losses, runs)
    assert ours[-1] < 0.8 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-4)
    own = model.state_dict()
    for name, parameter in twin.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(own[name.replace(".default", "")], parameter.data, rtol=1e-3, atol=1e-4)
    assert runs[0].evaluate()["eval_loss"] == pytest.approx(runs[1].evaluate()["eval_loss"], rel=1e-4)


def test_inside_the_trainer_it_learns_what_the_executor_learns(base: Checkpoint, tmp_path: Path) -> None:
    run = trainer(prepared(base), tmp_path, gradient_accumulation_steps=2, lr_scheduler_type="constant", max_steps=4)
    seen: list[list[int]] = []
    collate = run.data_collator
    run.data_collator = lambda examples: (seen.append([tuple(e["input_ids"]) for e in examples]), collate(examples))[1]
    run.train()
    alone = prepared(base).causal_lm
    optimizer = torch.optim.AdamW(alone.adapter.parameters(), lr=2e-2, weight_decay=0.0)
    sequences = {i: s for i, s in enumerate(random_sequences([12] * 4))}
    for step in range(4):
        optimizer.zero_grad()
        for micro in seen[2 * step : 2 * step + 2]:
            for i, ids in enumerate(micro):
                sequences[i].input_ids[:] = ids
            (batch,) = cut_padded([sequences[i] for i in range(len(micro))], 2, 1, 0)
            alone.sum_nats(batch, scale=1 / 44)[0].backward()
        torch.nn.utils.clip_grad_norm_(alone.adapter.parameters(), 1.0)
        optimizer.step()
    for name, tensor in run.model.state_dict().items():
        torch.testing.assert_close(tensor, alone.adapter.named_tensors()[name].data, rtol=1e-5, atol=1e-5)


def test_the_trainers_checkpoint_is_the_adapter_and_loads_in_peft(base: Checkpoint, tmp_path: Path) -> None:
    model = prepared(base, **STREAMED)
    trainer(model, tmp_path, save_strategy="steps", save_steps=6, **{CHECKPOINTING: True}).train()
    checkpoint = tmp_path / "checkpoint-6"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} <= names
    assert not {"model.safetensors", "pytorch_model.bin"} & names
    loaded = PeftModel.from_pretrained(base_model(base), checkpoint)
    inputs = padded_inputs()
    torch.testing.assert_close(loaded(**inputs).loss, model.eval()(**inputs).loss)
    assert json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base.folder)


def test_a_resumed_trainer_sees_the_same_numbers_dropout_included(base: Checkpoint, tmp_path: Path) -> None:
    lora = LORA.model_copy(update={"lora_dropout": 0.2})
    options = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    straight = prepared(base, lora)
    trainer(straight, tmp_path, **options).train()
    resumed = prepared(base, lora)
    trainer(resumed, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.forwards == straight.forwards == 12
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_the_trainer_loads_the_best_adapter_at_the_end(base: Checkpoint, tmp_path: Path) -> None:
    model = prepared(base)
    schedule = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    # The highest loss counts as the best, so that a run which learns has its best adapter at the beginning.
    run = trainer(model, tmp_path, **schedule, load_best_model_at_end=True, greater_is_better=True)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-6)


def test_label_smoothing_gets_logits_and_shifts_them(base: Checkpoint, tmp_path: Path) -> None:
    model = prepared(base)
    twin = peft_twin(base, model, tmp_path / "start", trainable=True)
    runs = [trainer(m, tmp_path, label_smoothing_factor=0.1, max_steps=2) for m in (model, twin)]
    for run in runs:
        run.train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-4)


def test_mixed_precision_of_the_trainer_changes_nothing(base: Checkpoint, tmp_path: Path) -> None:
    models = [prepared(base) for _ in range(2)]
    for model, bf16 in zip(models, (False, True), strict=True):
        trainer(model, tmp_path, max_steps=2, bf16=bf16).train()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


# --- TRL -------------------------------------------------------------------------------------------------------------

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="TRL is not installed: pip install 'drawplate[dev]'"
)


def sft(model: Any, base_folder: Path, folder: Path, **options: Any) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    options = {"max_steps": 6, "learning_rate": 5e-2, "logging_steps": 1, "max_length": 64, **options}
    arguments = SFTConfig(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        per_device_train_batch_size=4,
        save_strategy="no",
        **options,
    )
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": texts(24)}),
        eval_dataset=Dataset.from_dict({"text": texts(6, seed=1)}),
        processing_class=AutoTokenizer.from_pretrained(base_folder),
    )


def tiny_sft_model(folder: Path, **placement: Any) -> DrawplateForCausalLM:
    return prepared(open_base(write_base(folder)), **placement)


@needs_trl
@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own use of transformers
@PLACEMENTS
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_inside_trls_sft_trainer_it_learns(tmp_path: Path, placement: dict[str, Any], packing: bool) -> None:
    model = tiny_sft_model(tmp_path / "base", **placement)
    run = sft(model, tmp_path / "base", tmp_path / "run", packing=packing, gradient_accumulation_steps=2)
    assert run.model is model
    run.train()
    assert model.is_gradient_checkpointing, "TRL asks for it unless told otherwise"
    found = losses(run)
    assert found[-1] < 0.9 * found[0]
    entry = next(e for e in run.state.log_history if "entropy" in e)
    assert 0 < entry["entropy"] < math.log(len(run.processing_class))
    assert 0 <= entry["mean_token_accuracy"] <= 1
    assert run.evaluate()["eval_loss"] < found[0]
    run.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


@PLACEMENTS
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_token_scores_are_what_logits_say(name: str, tmp_path: Path, placement: dict[str, Any]) -> None:
    """What SFTTrainer asks for with `fused_lm_head=True`, against the logits, gradients of any weighting included."""
    checkpoint = write_model(tmp_path / name, name)
    model, inputs = with_noise(prepared(checkpoint, **placement)), padded_inputs()
    labels = inputs["labels"][:, 1:]
    counted = labels != -100
    logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    log_probs = logits.log_softmax(-1)
    own = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0].where(counted, torch.tensor(0.0))
    weights = torch.rand(own.shape, generator=torch.Generator().manual_seed(2))
    (own * weights).sum().backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    scores = model(**inputs, fused_lm_head=True)
    (scores.log_probs * weights).sum().backward()
    for parameter, gradient in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scores.log_probs, own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.loss, model(**inputs).loss)
    entropy = -(log_probs.exp() * log_probs).sum(-1) * counted
    torch.testing.assert_close(scores.entropy, entropy, rtol=1e-4, atol=1e-4)
    assert torch.equal(scores.is_top1, (logits.argmax(-1) == labels) & counted)
    assert torch.equal(scores.label_mask, counted)


def test_a_forward_that_needs_the_heads_weight_on_the_device_is_not_taken(base: Checkpoint) -> None:
    model = prepared(base)

    def fused(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> None:
        raise AssertionError("TRL's own head would read lm_head.weight")

    model.forward = fused
    assert model(**padded_inputs(), fused_lm_head=True).log_probs is not None

    def older(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("TRL's own head would read lm_head.weight")

    older.__module__ = "trl.trainer.sft_trainer"
    with pytest.raises(UsageError, match=r"TRL 1\.15"):
        model.forward = older
    model.forward = lambda *args, **kwargs: "wrapped"
    assert model(**padded_inputs()) == "wrapped", "any other wrapping, such as Accelerate's, stands"


# --- generation ------------------------------------------------------------------------------------------------------


@PLACEMENTS
@pytest.mark.parametrize("name", ["llama", "llama-untied", "mistral", "gemma2", "gemma3_text", "granite", "qwen3"])
def test_greedy_text_is_transformers_own(name: str, tmp_path: Path, placement: dict[str, Any]) -> None:
    checkpoint = write_model(tmp_path / name, name)
    model = with_noise(prepared(checkpoint, **placement))
    twin = peft_twin(checkpoint, model, tmp_path / "adapter")
    for prompts in (padded_inputs((5, 5))["input_ids"], padded_inputs((13,), seed=3)["input_ids"]):
        options = {"max_new_tokens": 16, "do_sample": False}
        theirs = twin.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **options)
        assert torch.equal(model.generate(prompts, **options), theirs)


def test_sampled_text_is_transformers_own(base: Checkpoint, tmp_path: Path) -> None:
    model = with_noise(prepared(base, **STREAMED))
    twin = peft_twin(base, model, tmp_path)
    prompt = padded_inputs((6,))["input_ids"]
    texts = []
    for generate in (model.generate, twin.generate):
        torch.manual_seed(11)
        mask = torch.ones_like(prompt)
        texts.append(
            generate(
                input_ids=prompt, attention_mask=mask, max_new_tokens=12, do_sample=True, temperature=0.7, top_p=0.9
            )
        )
    assert torch.equal(*texts)


def test_generation_in_the_middle_of_training_has_no_dropout_and_leaves_no_trace(
    base: Checkpoint, tmp_path: Path
) -> None:
    model = with_noise(prepared(base, LORA.model_copy(update={"lora_dropout": 0.5}), **STREAMED))
    prompt = padded_inputs((6,))["input_ids"]
    quiet = model.eval().generate(prompt, max_new_tokens=12, do_sample=False)
    loss = model(**padded_inputs()).loss
    model.train()(**padded_inputs()).loss.backward()
    assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False), quiet)
    assert model.eval()(**padded_inputs()).loss == loss


def test_the_models_ends_come_back_when_generation_fails(base: Checkpoint) -> None:
    model = prepared(base)
    skeleton = model.causal_lm.anatomy.skeleton
    ends = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(padded_inputs((6,))["input_ids"], max_new_tokens=-1)
    assert (skeleton.get_input_embeddings(), skeleton.get_output_embeddings()) == ends


def test_padded_prompts_are_refused(base: Checkpoint) -> None:
    model, inputs = prepared(base), padded_inputs()
    for mask in (inputs["attention_mask"].flip(1), None):
        with pytest.raises(UsageError, match="prompts are padded"):
            model.generate(inputs["input_ids"], attention_mask=mask, max_new_tokens=2)
    with pytest.raises(ValueError, match="input_ids"):
        model.generate()


def test_generation_settings_of_the_checkpoint_are_used(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "llama", "llama")
    path = checkpoint.folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_new_tokens": 3, "do_sample": False}))
    model = prepared(checkpoint)
    prompt = padded_inputs((6,))["input_ids"]
    assert model.generation_config.max_new_tokens == 3
    assert model.generate(prompt, eos_token_id=VOCAB + 1).shape == (1, 9)
