"""Packing, the training step and the optimiser, which SFT, policies and critics share."""
