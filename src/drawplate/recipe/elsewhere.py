"""Keys that people bring from PEFT, transformers and TRL, and where in a recipe each leads.

A key that is nearly spelt like one of ours is not what was meant: `lora.use_dora` is not `lora.use_rslora`.
"""

from __future__ import annotations

_LEADS: dict[str, str] = {
    # LoraConfig
    "use_dora": "Drawplate trains plain LoRA and no DoRA; remove it",
    "modules_to_save": "Drawplate trains LoRA matrices alone, and no whole layer such as the lm_head or the embedding; "
    "remove it",
    "rank_pattern": "every layer has the same rank, lora.r; remove it",
    "alpha_pattern": "every layer has the same lora.lora_alpha; remove it",
    "layers_to_transform": "write the layers as a regular expression in lora.target_modules, such as "
    r".*layers\.(0|1)\..*q_proj",
    "exclude_modules": "name the layers that get an adapter in lora.target_modules instead",
    "lora_bias": "the adapter's own matrices have no bias; remove it",
    "task_type": "the task is always causal language modelling; remove it",
    "base_model_name_or_path": "write model.name_or_path",
    "loftq_config": "lora.init_lora_weights: quantization_error starts from what 4 bits lost, which LoftQ does too",
    # BitsAndBytesConfig and from_pretrained
    "bnb_4bit_quant_storage": "4-bit weights are always kept in bytes; remove it",
    "torch_dtype": "the arithmetic is quantization.bnb_4bit_compute_dtype, the weights quantization.precision",
    "attn_implementation": "the attention kernel is chosen by measuring; remove it",
    "trust_remote_code": "code that comes with a model never runs; remove it",
    "quantization_config": "its keys are written in the section quantization",
    "max_memory": "write memory.vram and memory.ram",
    "offload_folder": "weights that do not fit on the GPU are streamed from host memory (memory.weights); remove it",
    # TrainingArguments
    "warmup_steps": "write train.warmup_ratio: warmup steps over all steps",
    "max_train_epochs": "write train.num_train_epochs",
    "label_smoothing_factor": "the loss is plain cross-entropy; remove it",
    "neftune_noise_alpha": "Drawplate adds no noise to embeddings; remove it",
    "torch_compile": "write model.compile",
    "tf32": "write quantization.bnb_4bit_compute_dtype; float32 is computed in float32",
    "use_liger_kernel": "the loss and the layers have kernels of their own; remove it",
    "activation_checkpointing": "write train.gradient_checkpointing, or memory.activations",
    "activation_offloading": "write memory.activations: offload",
    "auto_find_batch_size": "the micro-batch is planned to fit, and cut in two where memory runs out; remove it",
    "logging_steps": "every step is a line in metrics.jsonl; remove it",
    "run_name": "write tracking.project_name, or output_dir",
    "project": "write tracking.project_name",
    "eval_strategy": "write evaluation.eval_steps: optimizer steps between evaluations",
    "eval_on_start": "the base model is always measured before training; remove it",
    "metric_for_best_model": "the best adapter is that of the lowest held-out loss; remove it",
    "greater_is_better": "the best adapter is that of the lowest held-out loss; remove it",
    "save_strategy": "write train.save_steps or train.save_minutes",
    "save_total_limit": "the two newest checkpoints are kept; remove it",
    "save_only_model": "a checkpoint always has what going on needs; remove it",
    "push_to_hub": "nothing is uploaded; use `hf upload` on the adapter's folder",
    "data_seed": "write train.seed",
    "use_cpu": "write model.device_map: cpu",
    "no_cuda": "write model.device_map: cpu",
    "group_by_length": "write data.packing: true, which leaves no padding",
    "train_sampling_strategy": "the order is a shuffle by train.seed; remove it",
    "resume_from_checkpoint": "use the command `drawplate resume RUN`",
    "deepspeed": "Drawplate is one process on one GPU; write memory.vram, and what does not fit is streamed",
    "fsdp": "Drawplate is one process on one GPU; write memory.vram, and what does not fit is streamed",
    "optim_args": "the optimizer's keys are train.adam_beta1, adam_beta2, adam_epsilon and weight_decay",
    # SFTConfig and Unsloth
    "max_seq_length": "write data.max_length",
    "model_max_length": "write data.max_length",
    "block_size": "write data.max_length",
    "dataset_text_field": "write data.text_field",
    "assistant_only_loss": "of conversations only the assistant's turns are learnt; remove it",
    "completion_only_loss": "of prompt and completion only the completion is learnt; remove it",
    "use_gradient_checkpointing": "write train.gradient_checkpointing, or memory.activations",
    "use_exact_model_name": "write model.name_or_path",
}

_GROUPS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("dataloader_", "dataset_num_proc", "remove_unused_columns"), "documents are read once and kept; remove it"),
    (("ddp_", "local_rank", "accelerator_", "parallelism_"), "Drawplate is one process on one GPU; remove it"),
    (("fsdp_",), "Drawplate is one process on one GPU; write memory.vram, and what does not fit is streamed"),
    (("hub_",), "nothing is uploaded; use `hf upload` on the adapter's folder"),
    (("logging_", "log_level", "log_on_each"), "every step is a line in metrics.jsonl; remove it"),
    (("llm_int8_",), "int8 is row by row without outliers; remove it"),
    (("torch_compile_",), "write model.compile; the compiler's mode is chosen for you"),
    (("do_train", "do_eval", "do_predict"), "`drawplate tune` measures, trains and measures; remove it"),
    (
        ("eva_", "corda_", "lora_ga_", "velora_", "monteclora_", "arrow_", "kasa_", "alora_", "megatron_"),
        "Drawplate trains plain LoRA and does not have this variant; remove it",
    ),
    (
        ("use_qalora", "qalora_", "use_bdlora", "layer_replication", "trainable_token_", "target_parameters"),
        "Drawplate trains plain LoRA and does not have this variant; remove it",
    ),
)


def lead(key: str) -> str | None:
    """Where a key of another library leads, as the end of a sentence; None for one that is none of theirs."""
    leaf = key.rpartition(".")[2]
    if leaf in _LEADS:
        return _LEADS[leaf]
    return next((text for starts, text in _GROUPS if leaf.startswith(starts)), None)
