"""What torch sees of the library: one file per operation."""
