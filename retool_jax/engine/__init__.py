"""Sampling with a KV cache that lives through tool calls."""
