"""What the library costs, against what a user would otherwise pick: `bidora bench`, or `python -m benchmarks.run`."""
