"""Implementations of the op: one module for each way to run the chunk loop."""
