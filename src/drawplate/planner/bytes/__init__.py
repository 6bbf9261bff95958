"""How much memory a choice needs: the ledger, its replay, and a fast estimate."""
