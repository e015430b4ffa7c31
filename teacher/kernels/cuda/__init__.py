"""Kernels in CUDA, for what Triton cannot say; compiled on the machine by its own nvcc, else Triton's run."""
