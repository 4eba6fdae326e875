"""Attention backends: they read pages and return outputs and, on request, log-sum-exps and
scores."""

from pyramidinfer.attention.base import Backend, DecodePlan, Scale, Scored
from pyramidinfer.attention.select import available_backends, select_backend

__all__ = ["Backend", "DecodePlan", "Scale", "Scored", "available_backends", "select_backend"]
