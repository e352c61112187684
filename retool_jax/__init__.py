"""ReTool (arXiv 2504.11536) on JAX: reinforcement learning that teaches a language model to use Python."""

__version__ = "0.1.0"
