"""The base model's files and what they hold, before any layer is built."""
