"""A causal LM in parts: its anatomy, frozen weights and where they are, the adapter, the layers' execution, the loss."""
