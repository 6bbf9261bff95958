"""TRL's SFTTrainer around the mission's stack with Liger's kernels, which is how TRL is set up for speed.

The loop is the trainer's own: its callbacks mark the ends of the steps, so what it does between them counts, and what
it does before the first does not. Gradient clipping is off, as for every system here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from bench.peers import huggingface
from bench.peers.cases import Setting
from bench.peers.stepping import LEARNING_RATE, Clock, Documents, Steps, save_gradient

NO_CLIPPING = 1e9


class SftPeer(huggingface.PeftPeer):
    """Makes a trainer for each run of steps."""

    def __init__(self, peer: huggingface.PeftPeer, tokenizer: Any) -> None:
        super().__init__(peer.model, peer.device, peer.compute)
        self.tokenizer = tokenizer

    def take_steps(
        self,
        steps: Sequence[Sequence[Documents]],
        *,
        dropout: float,
        packed_tokens: int,
        gradient: Path | None = None,
    ) -> Steps:
        """As stepping.take_steps, by SFTTrainer.

        Raises:
            ValueError: packed rows, or several micro-batches in a step.
        """
        if packed_tokens or any(len(micro_batches) != 1 for micro_batches in steps):
            raise ValueError("is only measured on micro-batches of equal documents")
        for module in self._dropouts:
            module.p = dropout
        rows = [{"input_ids": ids.tolist()} for (documents,) in steps for ids in documents]
        watch = _Watch(self, gradient)
        arguments = SFTConfig(
            output_dir=tempfile.mkdtemp(prefix="sft-"),
            max_steps=len(steps),
            per_device_train_batch_size=len(steps[0][0]),
            gradient_accumulation_steps=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=NO_CLIPPING,
            optim="adamw_torch_fused",
            bf16=True,
            gradient_checkpointing=True,
            use_liger_kernel=True,
            max_length=None,
            packing=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy="sequential",
        )
        trainer = SFTTrainer(
            self.model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
            callbacks=[watch],
        )
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        return Steps(watch.clock.seconds(), [e["loss"] for e in logged], [float(e["grad_norm"]) for e in logged])


class _Watch(TrainerCallback):
    """Marks the ends of steps and keeps the first gradient."""

    def __init__(self, peer: SftPeer, gradient: Path | None) -> None:
        self.peer, self.gradient, self.clock = peer, gradient, Clock(peer.device)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """The gradients are complete."""
        if self.gradient is not None:
            save_gradient(self.peer.adapter, self.gradient)
            self.gradient = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """An optimizer step is done."""
        self.clock.mark()


def load(folder: Path, setting: Setting) -> SftPeer:
    """The mission's model in bf16 arithmetic, with Liger."""
    from transformers import AutoTokenizer

    options = {"compute": "bfloat16", **setting.options}
    liger = Setting(system="liger", name=setting.name, dropout=setting.dropout, options=options)
    peer = huggingface.load(folder, liger if torch.cuda.is_available() else setting)
    return SftPeer(peer, AutoTokenizer.from_pretrained(folder))
