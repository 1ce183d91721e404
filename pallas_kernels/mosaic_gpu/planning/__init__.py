"""What goes before and after the Hopper kernels: the bias in their form, which tiles to visit,
sums of what they leave.

It is little work in many steps, and a launch for each step would cost a tenth of a training
step; so on a GPU a few small Triton kernels do it. `by_xla` is the same in plain JAX, for
interpret mode and where Triton is missing.
"""
