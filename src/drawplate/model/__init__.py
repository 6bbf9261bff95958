"""A causal LM in parts: anatomy, frozen weights and where they are, adapter, layer execution, loss."""
