"""What to keep: one file a method, one registry line."""

from pyramidinfer.policies.base import Forecast, Policy
from pyramidinfer.policies.full import Full
from pyramidinfer.policies.pyramidinfer import PyramidInfer
from pyramidinfer.policies.registry import POLICIES, make_policy

__all__ = ["POLICIES", "Forecast", "Full", "Policy", "PyramidInfer", "make_policy"]
