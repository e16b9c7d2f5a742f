"""Disentanglement metrics: codes and ground-truth factors in, scores out."""

from fastdis.metrics.mig import MIGResult, mig

__all__ = ["MIGResult", "mig"]
