"""Triton kernels and their launchers, one file per operation; imported only where a Triton backend serves a call."""
