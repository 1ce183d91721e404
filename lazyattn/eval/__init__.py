"""`--mode=eval`: how good a model is."""
