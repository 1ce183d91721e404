"""What a training step needs on a machine that is not here: memory, time, traffic."""
