"""Reinforcement learning: rollouts, rewards, advantages, losses and the loop that joins them."""
