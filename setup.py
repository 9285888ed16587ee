"""Everything static is in pyproject.toml."""

from setuptools import setup

setup()
