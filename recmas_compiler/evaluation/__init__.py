"""Evaluation: how good, how fast and how cheap a system is beside its alternatives."""

from recmas_compiler.evaluation.data.protocol import Protocol, load_protocol, protocol_names
from recmas_compiler.evaluation.report import Report

__all__ = [
    "Protocol",
    "Report",
    "load_protocol",
    "protocol_names",
]
