"""RMS norm and RoPE of queries or keys in one pass over memory, on NVIDIA GPUs, in Triton."""
