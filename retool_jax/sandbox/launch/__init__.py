"""The back-ends: how a worker is started, what keeps it apart, and what is left of it, which is removed."""
