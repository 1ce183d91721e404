"""`--mode=export`: trained models for others, as an Orbax checkpoint or as safetensors."""
