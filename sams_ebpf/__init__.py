"""Exact CPU accounting per executable for HPC jobs."""

__version__ = "0.1.0"
