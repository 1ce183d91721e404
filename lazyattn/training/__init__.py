"""Parameters to better parameters: optimizer, step, checkpoints, loop."""
