"""Measuring systems against each other: time, tokens and speed-up in one run."""

from recmas_runtime.bench.measure import BenchSettings, Case, make_cases
from recmas_runtime.bench.report import BenchReport, run_bench

__all__ = ["BenchReport", "BenchSettings", "Case", "make_cases", "run_bench"]
