"""Training: configuration, state, step, loop, checkpoints and the folder of a run."""
