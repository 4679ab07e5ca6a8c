"""The training loop, its ranks, and how they are started."""
