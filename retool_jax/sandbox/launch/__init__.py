"""The back-ends: they start workers, isolate them, and remove what is left of them."""
