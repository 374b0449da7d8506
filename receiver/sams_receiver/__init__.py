"""Receives batches from nodes and archives them durably."""
