"""The loop and what keeps it safe: optimiser, checkpoints, plan."""
