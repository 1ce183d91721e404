"""A module in the compiler's notation, small enough to count by hand.

Four devices hold a quarter each of three layers' weights [8, 64]. The loop slices one
layer's, gathers it, multiplies, and keeps each layer's input.
"""

from pathlib import Path

TEXT = (Path(__file__).parent / "step.hlo").read_text()
