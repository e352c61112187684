"""The Qwen2 decoder."""
