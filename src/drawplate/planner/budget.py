"""How many bytes a run may take, and what is missing where a prediction exceeds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

DEVICE_MARGIN, HOST_MARGIN = 0.03, 0.05
"""Shares of a prediction by which it may be wrong: what the ledger promises."""


class Need(NamedTuple):
    """Peak bytes."""

    device: int
    host: int


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes at most."""

    device_bytes: int
    host_bytes: int

    def missing(self, need: Need) -> dict[str, int]:
        """Bytes by which a prediction, with its margin, exceeds the budget; only places where it does."""
        excess = {
            "device": int(need.device * (1 + DEVICE_MARGIN)) - self.device_bytes,
            "host": int(need.host * (1 + HOST_MARGIN)) - self.host_bytes,
        }
        return {where: count for where, count in excess.items() if count > 0}

    def excess(self, need: Need) -> int:
        """The sum of what is missing; 0 where it fits."""
        return max(0, int(need.device * (1 + DEVICE_MARGIN)) - self.device_bytes) + max(
            0, int(need.host * (1 + HOST_MARGIN)) - self.host_bytes
        )
