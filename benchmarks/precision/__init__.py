"""Errors against FP64 of a linear cross entropy's loss and gradients, on a CPU.

python -m benchmarks.precision --write          # writes docs/precision.md, in a quarter of an hour
python -m benchmarks.precision --only one-hot   # prints the cases whose names contain this
"""
