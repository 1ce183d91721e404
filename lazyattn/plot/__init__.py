"""`--mode=plot`: losses of runs as a picture."""
