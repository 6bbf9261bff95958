"""The most tokens per second that a card's matrix rate allows for LoRA training without recomputation."""

from __future__ import annotations

from typing import Any


def product_parameters(shape: dict[str, Any]) -> int:
    """Weights that take part in matrix products: linear layers and head, not the embedding's look-up."""
    hidden, heads, key_heads = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    head_dim = shape.get("head_dim", hidden // heads)
    attention = 2 * hidden * heads * head_dim + 2 * hidden * key_heads * head_dim
    layer = attention + 3 * hidden * shape["intermediate_size"]
    return shape["num_hidden_layers"] * layer + shape["vocab_size"] * hidden


def ceiling(shape: dict[str, Any], length: int, flops_per_second: float) -> float:
    """Tokens per second at full matrix rate.

    4 FLOPs a parameter and token (forward, and backward to the input alone: the weights are frozen), and causal
    attention over `length`: 2 * length * width a layer forward, two and a half times that backward (Dao 2023).
    """
    width = shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"]) * shape["num_attention_heads"]
    attention = 7 * length * width * shape["num_hidden_layers"]
    return flops_per_second / (4 * product_parameters(shape) + attention)
