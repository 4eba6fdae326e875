"""``pyramidinfer bench``: throughput, latency, memory, kernels; and a comparison with peers."""
