"""Files -> documents -> train | held-out -> token windows -> micro-batches; each step counts what it leaves out."""
