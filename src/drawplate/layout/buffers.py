"""How many buffers the runtime keeps for what crosses the bus, which the plan counts."""

from __future__ import annotations

RETURN_BUFFERS = 2
"""Device buffers in which layer inputs come back from host memory."""
LANDINGS = 2
"""Host buffers in which gradients of an adapter in host memory arrive."""
