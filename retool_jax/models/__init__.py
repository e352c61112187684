"""The decoder, its kernels, and its checkpoints."""
