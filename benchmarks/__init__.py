"""Benchmarks: `python -m benchmarks` lists the cases, `python -m benchmarks run` runs them.

A case (registry.py) is data: how to make its inputs, its contenders, which of them are compared and
how many bytes and FLOPs the work needs. One runner (runner.py) checks that the contenders agree,
then times them interleaved. Results are JSON; report.py turns them into the README's tables.
"""

import os

# Kineto announces every profile on stderr otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
