# SPDX-License-Identifier: MIT
"""Benchmark of the kernels against what a user of PyTorch has without them: ``python -m bench --help``."""
