"""Turns archives into core-hours per software, reports and SAMS records."""
