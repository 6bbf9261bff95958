"""The commands: a run from its recipe to its adapter, record and report."""
