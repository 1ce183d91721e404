"""What goes before and after the Hopper kernels: the bias in their form, which tiles to visit,
the order of work tiles, and sums of what the kernels leave.

It is little work in many steps. `by_triton` has a few small Triton kernels for it. `by_xla` is the
same in plain JAX, with 3 to 5% more time for a training call: see
docs/log/2026-11-30-hopper-planning-in-jax.md. It serves in interpret mode, and where Triton is
missing.
"""
