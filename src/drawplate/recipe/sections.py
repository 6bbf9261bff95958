"""The user's whole vocabulary: one YAML file, one frozen model, every key validated before anything is loaded.

Key names are the ones people know from `transformers.TrainingArguments`, `peft.LoraConfig` and
`transformers.BitsAndBytesConfig`, grouped into sections. A key left out is `auto` (or its stated default); what
`auto` became is written to the run folder's `recipe.yaml` and explained by the plan. The type of a key decides what its
value is taken for (values.py).
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from drawplate.recipe.places import expand, located
from drawplate.recipe.values import as_meant, layer_names, memory_size

Auto = Literal["auto"]
Precision = Literal["nf4", "fp4", "int8", "fp8", "bf16", "fp16", "fp32"]
ComputeDtype = Literal["float16", "bfloat16", "float32"]
Bytes = Annotated[int, BeforeValidator(memory_size)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
USUAL_RANK = 16
USUAL_TARGETS = "all-linear"
USUAL_START = "quantization_error"
FOUR_BITS = ("nf4", "fp4")


def _off(value: Any) -> Any:
    """YAML 1.1 reads the word `off` as False."""
    return "off" if value is False else value


class Section(BaseModel):
    """Frozen, and strict about names."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, coerce_numbers_to_str=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        return as_meant(name, value, cls.model_fields[name].annotation)


class ModelSection(Section):
    """Which base model, and where it runs."""

    name_or_path: str = Field(description="A folder, or a repository name on the Hugging Face hub.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub repository.")
    gguf_file: str | None = Field(None, description="A GGUF file inside the folder or repository, converted once.")
    device_map: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto: CUDA if there is one, else CPU.")
    compile: Literal["auto", True, False] = Field("auto", description="Compile the layer function; auto: on CUDA.")


class QuantizationSection(Section):
    """Precision of the frozen base weights, in BitsAndBytesConfig's words, or as one `precision`."""

    precision: Precision | Auto = Field(
        "auto", description="nf4, fp4, int8, bf16, fp16 or fp32 for the frozen weights; fp8 for their products too."
    )
    load_in_4bit: bool | None = Field(None, description="Same as precision nf4 or fp4.")
    load_in_8bit: bool | None = Field(None, description="Same as precision int8.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="The 4-bit data type.")
    bnb_4bit_use_double_quant: bool | Auto = Field(
        "auto", description="Quantize the 4-bit scales too (0.4 bit a weight less); auto: on, or as the checkpoint is."
    )
    bnb_4bit_compute_dtype: ComputeDtype | Auto = Field("auto", description="Arithmetic of the matrix products.")

    @model_validator(mode="after")
    def _one_precision(self) -> QuantizationSection:
        named = [n for n, on in (("load_in_4bit", self.load_in_4bit), ("load_in_8bit", self.load_in_8bit)) if on]
        if len(named) == 2:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other")
        if named and self.precision not in ("auto", self._from_flags()):
            raise ValueError(f"precision {self.precision} and {named[0]} disagree; give one of them")
        return self

    def _from_flags(self) -> Precision | Auto:
        if self.load_in_4bit:
            return self.bnb_4bit_quant_type
        return "int8" if self.load_in_8bit else "auto"

    @property
    def chosen(self) -> Precision | Auto:
        """The precision that was asked for, whichever way it was said."""
        return self.precision if self.precision != "auto" else self._from_flags()


class LoraSection(Section):
    """The adapter, in LoraConfig's words."""

    r: Count | Auto = Field("auto", description="Rank; auto: by the model's width.")
    lora_alpha: Positive | Auto = Field(
        "auto", description="The update is scaled by lora_alpha / r (or / sqrt(r), rslora); auto: twice r."
    )
    target_modules: Annotated[list[str] | str, BeforeValidator(layer_names)] = Field(
        "auto", description="Names of linear layers, or all-linear; auto: all-linear."
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Share of the adapter's input set to zero in training.")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases are trained too.")
    init_lora_weights: Literal["default", "quantization_error"] | Auto = Field(
        "auto",
        description="default: B starts at zero; quantization_error: A and B start as the leading part of what 4 bits "
        "lost, where the unquantized weights are measured anyway (evaluation.quantization_tax).",
    )
    use_rslora: bool = Field(False, description="Rank-stabilised scaling.")
    loraplus_lr_ratio: float = Field(
        1.0, gt=0, description="Learning rate of the B matrices over that of the A matrices (LoRA+)."
    )

    def filled(self) -> LoraSection:
        """With the usual values where it says auto."""
        rank = USUAL_RANK if self.r == "auto" else self.r
        alpha = usual_alpha(rank) if self.lora_alpha == "auto" else self.lora_alpha
        targets = USUAL_TARGETS if self.target_modules == "auto" else self.target_modules
        start = USUAL_START if self.init_lora_weights == "auto" else self.init_lora_weights
        usual = {"r": rank, "lora_alpha": alpha, "target_modules": targets, "init_lora_weights": start}
        return self.model_copy(update=usual)


def usual_alpha(rank: int) -> float:
    """Scales the update by two, whatever the rank."""
    return 2.0 * rank


def _listed(values: Any, *keys: str) -> Any:
    """One file given as a string is a list of one."""
    if not isinstance(values, dict):
        return values
    return {k: [v] if k in keys and isinstance(v, str) else v for k, v in values.items()}


class DataSection(Section):
    """Which documents, and how they become training sequences."""

    files: list[str] = Field(default=[], description="Files or folders: .txt .md .html .jsonl .json .parquet .csv.")
    dataset: str | None = Field(None, description="A dataset on the Hugging Face hub, instead of files.")
    dataset_config: str | None = Field(None, description="Configuration of the hub dataset, where it has several.")
    dataset_split: str = Field("train", description="Split of the hub dataset.")
    text_field: str = Field("text", description="Column that holds the text in .jsonl, .parquet, .csv and datasets.")
    encoding: str | None = Field(None, description="Encoding of text files that are not UTF-8, like cp1250.")
    chat_markup: Literal["text", "parse"] = Field(
        "text", description="Texts with <|im_start|> and the like in them: text, or parse them into messages."
    )
    template_date: datetime | None = Field(
        None, description="The day that a chat template writes; none: the day on which the run began."
    )
    split_pattern: str | None = Field(
        None, description="Regular expression; a document starts at each line it matches, less what it matches."
    )
    min_characters: int = Field(1, ge=1, description="Documents with fewer characters are left out, and counted.")
    heldout_fraction: float = Field(0.1, gt=0, lt=1, description="Share of documents held out of training.")
    heldout_files: list[str] = Field(default=[], description="Held-out documents given by hand, instead of a share.")
    group_by: str | None = Field(
        None, description="Keep documents of a group on one side: a column of the rows, folder, or file."
    )
    near_duplicates: Annotated[Literal["auto", "keep", "off"], BeforeValidator(_off)] = Field(
        "auto",
        description="auto: training documents that nearly repeat a held-out one are set aside; keep: only counted; "
        "off: not looked for.",
    )
    near_duplicate_threshold: float = Field(
        0.8, gt=0, le=1, description="Jaccard over runs of five words from which two documents are near-duplicates."
    )
    max_length: Annotated[int, Field(ge=2)] | Auto = Field(
        "auto", description="Tokens in a window; longer documents become several windows."
    )
    packing: bool | Auto = Field("auto", description="Put several documents in one row; auto: on. Off: pad.")
    pad_to_multiple_of: int = Field(16, ge=1, description="Rows are padded to a multiple of this many tokens.")

    @model_validator(mode="before")
    @classmethod
    def _one_file_is_a_list(cls, values: Any) -> Any:
        return _listed(values, "files", "heldout_files")

    @field_validator("encoding")
    @classmethod
    def _encoding_exists(cls, value: str | None) -> str | None:
        try:
            "".encode(value or "utf-8")
        except LookupError:
            raise ValueError(f"there is no encoding of text called {value}; cp1250 and koi8-r are examples") from None
        return value

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if bool(self.files) == bool(self.dataset):
            raise ValueError("give either data.files or data.dataset")
        return self


class TrainSection(Section):
    """The loop, in TrainingArguments' words."""

    num_train_epochs: Positive | Auto = Field("auto", description="Passes over the training documents.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps at most.")
    max_minutes: float | None = Field(None, gt=0, description="Minutes of training at most; the schedule adapts.")
    per_device_train_batch_size: Count | Auto = Field("auto", description="Sequences in a micro-batch.")
    gradient_accumulation_steps: Count | Auto = Field("auto", description="Micro-batches in an optimizer step.")
    effective_batch_size: Count | Auto = Field("auto", description="Sequences in an optimizer step.")
    min_target_tokens: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto",
        description="A sequence with fewer target tokens does not fill a step: it joins one. 0: each sequence counts.",
    )
    learning_rate: Positive | Auto = Field("auto", description="Peak learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] | Auto = Field(
        "auto", description="How the learning rate falls after the warmup."
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | Auto = Field(
        "auto", description="Share of the steps in which the rate rises."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay of the adapter's weights.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients longer than this are scaled down to it.")
    optim: Literal["adamw_torch", "adamw_8bit"] = Field(
        "adamw_torch", description="The optimizer; adamw_8bit keeps its moments in 8 bits."
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the mean of gradients.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the mean of squared gradients.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Keeps the update finite where gradients vanish.")
    fp16: bool | None = Field(None, description="Half precision with a loss scaler.")
    bf16: bool | None = Field(None, description="bfloat16 arithmetic.")
    gradient_checkpointing: bool | Auto = Field("auto", description="Recompute activations in backward.")
    save_steps: Count | Auto = Field("auto", description="Optimizer steps between checkpoints; auto: a tenth of all.")
    save_minutes: float = Field(5.0, gt=0, description="Minutes between checkpoints at most, within a long step too.")
    keep_checkpoints: bool = Field(
        False, description="Leave the checkpoints of a finished run; `drawplate resume RUN --prove` needs them."
    )
    seed: int = Field(42, ge=0, description="Decides the split, the order, the dropout and the adapter's start.")

    @model_validator(mode="after")
    def _agree(self) -> TrainSection:
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 exclude each other")
        parts = (self.per_device_train_batch_size, self.gradient_accumulation_steps, self.effective_batch_size)
        if "auto" not in parts and parts[0] * parts[1] != parts[2]:  # type: ignore[operator]
            raise ValueError("effective_batch_size is not per_device_train_batch_size x gradient_accumulation_steps")
        _, accumulation, effective = parts
        if "auto" not in (accumulation, effective) and effective % accumulation:  # type: ignore[operator]
            raise ValueError("effective_batch_size is not a multiple of gradient_accumulation_steps")
        return self


class EvaluationSection(Section):
    """How, and how often, the held-out documents are measured."""

    per_device_eval_batch_size: Count | Auto = Field("auto", description="Sequences in an evaluation micro-batch.")
    eval_accumulation_steps: int | None = Field(
        None, ge=1, description="Accepted for compatibility: no logits are kept, so nothing accumulates."
    )
    context_tokens: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto",
        description="Tokens that each window of a long document reads again, uncounted; auto: half a window, 0: none.",
    )
    quantization_tax: Literal["auto", True, False] = Field(
        "auto",
        description="Measure the base model unquantized too, before training and after it with the adapter; auto: "
        "where its layers can be streamed or fit.",
    )
    forgetting: bool = Field(True, description="Measure general text that is not of the domain, before and after.")
    general_files: list[str] = Field(default=[], description="That text; none: English prose that Drawplate ships.")
    forgetting_warn_percent: float = Field(
        3.0, ge=0, description="Warn where perplexity of the general text rises by more than this."
    )
    eval_steps: int | None = Field(None, ge=1, description="Optimizer steps between evaluations; none: only the end.")
    early_stopping_patience: int | None = Field(None, ge=1, description="Stop after so many evaluations without gain.")
    load_best_model_at_end: bool = Field(True, description="Keep the adapter with the lowest held-out loss.")

    @model_validator(mode="before")
    @classmethod
    def _one_file_is_a_list(cls, values: Any) -> Any:
        return _listed(values, "general_files")


class MemorySection(Section):
    """The budget, and how it may be spent."""

    vram: Bytes | None = Field(None, description="Device bytes at most, like 6GiB; none: what the device has.")
    ram: Bytes | None = Field(None, description="Host bytes at most; none: what the machine has.")
    weights: Literal["auto", "device", "dequantized", "host"] = Field(
        "auto",
        description="Where frozen layers live: on the device, there dequantized (fp8: with the transpose that backward "
        "needs), or streamed from the host.",
    )
    activations: Literal["auto", "keep", "recompute", "offload"] = Field(
        "auto", description="Kept, recomputed from inputs on the device, or from inputs offloaded to the host."
    )
    rehearsal: Annotated[Literal["auto", "replan", "off"], BeforeValidator(_off)] = Field(
        "auto",
        description="Try the worst batches first; auto: stop where the budget does not hold, replan: plan anew, off.",
    )
    adapter: Literal["auto", "device", "host"] = Field(
        "auto",
        description="Where adapter, gradients and optimizer live; auto: on the device. host: a layer's visits it.",
    )
    log_frequency: int = Field(10, ge=1, description="Optimizer steps between memory samples.")


class TrackingSection(Section):
    """Trackers beside metrics.jsonl, which is always written."""

    report_to: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = Field(
        default=[], description="Any of tensorboard, trackio, wandb, mlflow; each is an extra to install."
    )
    project_name: str = Field("drawplate", description="The name that trackers file the run under.")

    @model_validator(mode="before")
    @classmethod
    def _one_tracker_is_a_list(cls, values: Any) -> Any:
        return (
            values
            if not isinstance(values, dict) or values.get("report_to") == "none"
            else _listed(values, "report_to")
        )


class Recipe(Section):
    """A whole run, as the user wants it."""

    model: ModelSection
    data: DataSection
    output_dir: str = Field("runs/drawplate", description="The run's folder; must not exist or be empty.")
    quantization: QuantizationSection = QuantizationSection()
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    evaluation: EvaluationSection = EvaluationSection()
    memory: MemorySection = MemorySection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _checkpointing_and_activations_agree(self) -> Recipe:
        if self.train.gradient_checkpointing is False and self.memory.activations in ("recompute", "offload"):
            raise ValueError("train.gradient_checkpointing is off but memory.activations asks for recomputation")
        if self.memory.adapter == "host" and self.train.optim == "adamw_8bit":
            raise ValueError("memory.adapter is host but train.optim adamw_8bit keeps its moments on the device")
        if self.train.gradient_checkpointing is True and self.memory.activations == "keep":
            raise ValueError("train.gradient_checkpointing is on but memory.activations is keep")
        return self

    def located(self) -> Recipe:
        """This recipe with what lies in the current folder named by its whole path, so that it means the same anywhere.

        A path with `~` or `${DRAWPLATE_CACHE}` stays as it is, and so does a model's name that is no folder here.
        """
        data, evaluation = self.data, self.evaluation
        general = {"general_files": [located(path) for path in evaluation.general_files]}
        files = {name: [located(path) for path in getattr(data, name)] for name in ("files", "heldout_files")}
        name = self.model.name_or_path
        named = {"name_or_path": located(name) if expand(name).is_dir() else name}
        return self.model_copy(
            update={
                "model": self.model.model_copy(update=named),
                "data": data.model_copy(update=files),
                "evaluation": evaluation.model_copy(update=general),
            }
        )

    def to_yaml(self) -> str:
        """This recipe as YAML that `load_recipe` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
