"""One decoder layer: its parts, how it attends, its adapters, how it is run."""
