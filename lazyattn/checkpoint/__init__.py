"""What a run leaves behind: its state, its settings, its folder; every mode reads it."""
