"""Constants of the estimate: measured, fitted to measurements, or assumed, each with its source."""

MIB, GIB = 2**20, 2**30

# Fitted (tests/bench/fit_estimate.py): measured peak of allocated memory less what the formulas count.
WORKSPACE_BYTES = {"transformer_engine": 91 * MIB, "local": 52 * MIB}

# Fitted: ratio of torch's peak reserved to peak allocated memory.
RESERVED_SHARE = 1.055

# Fitted: seconds per second at the data sheet's rate; for "layers", seconds per layer.
SECONDS = {
    "products": 1.48,
    "attention": 2.1,
    "FlashAttention 4": 1.97,
    "traffic": 0.467,
    "weights": 2.22,
    "layers of a micro-batch": 0.000453,
    "layers of a step": 0.000913,
}

# Fitted: what the layers' products take in FP8 of their time in bf16, quantization included, by FP8_RECIPE: 3B on one
# H200, sequence 4096, micro-batch 4 (docs/benchmarks.md). For other sizes the same share is assumed.
FP8_PRODUCTS = {"tensorwise": 0.64, "delayed": 0.6, "blockwise": 0.73}

# Assumed: a CUDA context with its kernels; NCCL's own buffers. torch's allocator counts neither.
CONTEXT_BYTES = 600 * MIB
NCCL_BYTES = 1 * GIB

# Three quarters of PCIe 5 x16's 63 GB/s, in both directions at once; an H200 reached 46 to 47 (docs/benchmarks.md).
HOST_BYTES_PER_SECOND = 0.75 * 63e9

# Assumed: three quarters of NVLink 4's 450 GB/s per direction, and of one 400 Gbit/s network card per GPU.
LINK_BYTES_PER_SECOND = 0.75 * 450e9
NETWORK_BYTES_PER_SECOND = 0.75 * 50e9

# Fitted: what tensor parallelism takes of the time of its collectives where the GPUs' copy engines overlap them with
# GEMMs, 3B and 7B at TP2 on two H200 (docs/benchmarks.md): what is not hidden, sums, and smaller GEMMs.
EXCHANGE_SHARE = 0.7
