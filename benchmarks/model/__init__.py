"""A model of what the decode kernels take on a GPU. No GPU, no torch, no measurement.

`python -m benchmarks.model --help` says how to ask it; docs/performance_model.md says
what it assumes, and holds what it predicts.
"""
