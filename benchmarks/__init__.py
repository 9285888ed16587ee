"""What the library costs, against what a user would otherwise pick: `bidora bench`, or `python -m benchmarks.run`."""

import os

# PyTorch's profiler, which counts the allocations, announces every start and stop otherwise
os.environ.setdefault("KINETO_LOG_LEVEL", "5")
