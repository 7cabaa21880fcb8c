"""Training: steps, loop, checkpoints, processes, and what keeps a long run going."""
