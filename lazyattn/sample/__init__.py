"""`--mode=sample`: text from a run's checkpoint."""
