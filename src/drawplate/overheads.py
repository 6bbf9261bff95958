"""What libraries and compiler take beside what a ledger can compute: typical figures, until a run has measured its own.

Measured on one H100 with torch 2.11 (bench/results/plan-accuracy-h100.json); a run's rehearsal puts its own machine's
figures in their place (rehearse.py).
"""

from __future__ import annotations

from drawplate.units import MIB

CONTEXT_BYTES, STEP_CONTEXT_BYTES = 830 * MIB, 148 * MIB
"""Device memory outside torch's allocator after a compiled step, and by how much it has grown since loading."""

LOADING_HOST_BYTES, RUNTIME_HOST_BYTES = 237 * MIB, 1168 * MIB
"""Host memory of CUDA and its libraries after loading, and with the compiler's after a compiled step: 1,068 MiB with
adapters on q and v, some 150 more with adapters on all linear layers."""

CPU_RUNTIME_HOST_BYTES = 160 * MIB
"""Libraries that a run imports after it has planned, and the products that oneDNN keeps compiled (device.py)."""
