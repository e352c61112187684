"""How good a policy is on held-out problems, and how it behaves."""
