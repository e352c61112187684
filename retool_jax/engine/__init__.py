"""Sampling with a KV cache that is kept across tool calls."""
