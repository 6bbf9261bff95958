"""What libraries and compiler take beside what a ledger can compute: typical figures, until a run has measured its own.

Measured on one H100 with torch 2.11 (bench/results/plan-accuracy-h100.json); a run's rehearsal puts its own machine's
figures in their place (run/rehearse.py).
"""

from __future__ import annotations

from drawplate.units import MIB

CONTEXT_BYTES, STEP_CONTEXT_BYTES = 842 * MIB, 78 * MIB
"""Device memory outside torch's allocator after a compiled step, and by how much it has grown since loading."""

LOADING_HOST_BYTES, RUNTIME_HOST_BYTES = 237 * MIB, 860 * MIB
"""Host memory of CUDA and its libraries after loading, and after a step in float32."""

HALF_HOST_BYTES = 200 * MIB
"""What products in 16 bits add to that: cuBLAS's kernels for them."""

SOLVER_CONTEXT_BYTES, SOLVER_HOST_BYTES = 96 * MIB, 130 * MIB
"""What cuSOLVER adds to both, which finds where the adapter starts in the error of 4-bit weights."""

ROWS_ATTENTION_CONTEXT_BYTES = 76 * MIB
"""What cuDNN adds to the context, which attends to padded rows in 16 bits. These four are from the runs of
bench/results/acceptance-h200.json."""

COMPILER_HOST_BYTES, COMPILED_ADAPTER_HOST_BYTES = 30 * MIB, 6 * MIB
"""What the compiler holds beside that, and for each linear layer of a decoder layer that has an adapter: its graphs."""

ROWS_ATTENTION_HOST_BYTES = 50 * MIB
"""cuDNN, which attends to padded rows; to packed ones torch does itself. All three are fitted to 68 runs on H100s; the
18 on an H200, which are not among them, are within 5 % with them."""

CPU_RUNTIME_HOST_BYTES = 160 * MIB
"""Libraries that a run imports after it has planned, and the products that oneDNN keeps (machine/device.py)."""
