"""Trained models for others: parameters alone, as an Orbax checkpoint or as safetensors."""
