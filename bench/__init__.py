"""Benchmarks: measured, written down with their method, never asserted on time."""
