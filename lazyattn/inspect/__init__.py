"""`--mode=inspect`: what a model's attention does."""
