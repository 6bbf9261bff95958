from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = "the cat sat on a mat and looked at the climate of the sea while user and assistant spoke of it " * 20
SPECIAL = ["<|end|>", "<|bos|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)


def _byte_level_bpe() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([WORDS], trainer)
    return backend


@pytest.fixture(scope="session")
def tokenizer():
    """A throwaway byte-level BPE tokenizer of 320 words with ChatML's control tokens; it adds nothing by itself."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(),
        eos_token="<|end|>",
        pad_token="<|end|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def bos_tokenizer():
    """The same, but configured to write BOS before and EOS after every text."""
    backend = _byte_level_bpe()
    ends = [("<|bos|>", backend.token_to_id("<|bos|>")), ("<|end|>", backend.token_to_id("<|end|>"))]
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A <|end|>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|end|>")


@pytest.fixture
def tokenizer_folder(tokenizer, tmp_path) -> Path:
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    return folder
