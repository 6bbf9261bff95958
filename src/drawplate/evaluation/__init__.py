"""Losses of documents, and intervals over them."""
