"""Says whether the kernels' GPU tests can run here: status 0, or 1 and why not."""

import sys

from pallas_kernels.triton import support

if __name__ == "__main__":
    reason = support.refusal(64, 64, "bfloat16")
    if reason is not None:
        sys.exit(f"make test-gpu can't run here, since {reason}; BUILD.md says what it takes.")
