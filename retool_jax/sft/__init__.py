"""Supervised fine-tuning: the cold start."""
