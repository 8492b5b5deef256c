"""Constants that no formula gives: measured, fitted to measurements, or assumed, each with its source."""

MIB, GIB = 2**20, 2**30

# Fitted (tests/bench/fit_estimate.py): what one GPU had allocated at most beyond the formulas.
WORKSPACE_BYTES = {"transformer_engine": 91 * MIB, "local": 52 * MIB}

# Fitted: what the allocator holds against what is allocated, at their most.
RESERVED_SHARE = 1.055

# Fitted: seconds for each second at the data sheet's rate; for "layers", seconds a layer.
SECONDS = {
    "products": 1.48,
    "attention": 2.1,
    "FlashAttention 4": 1.97,
    "traffic": 0.467,
    "weights": 2.22,
    "layers of a micro-batch": 0.000453,
    "layers of a step": 0.000913,
}

# Assumed: a CUDA context with its kernels; NCCL's own buffers. Neither is in what torch allocates.
CONTEXT_BYTES = 600 * MIB
NCCL_BYTES = 1 * GIB

# Assumed: three quarters of PCIe 5 x16's 63 GB/s, one way after the other.
HOST_BYTES_PER_SECOND = 0.75 * 63e9

# Assumed: three quarters of NVLink 4's 450 GB/s each way, and of a 400 Gbit/s network card a GPU.
LINK_BYTES_PER_SECOND = 0.75 * 450e9
NETWORK_BYTES_PER_SECOND = 0.75 * 50e9
