"""PyramidInfer: an inference engine in which fewer tokens are computed and fewer are kept."""

from pyramidinfer.engine.llm import LLM
from pyramidinfer.policies import Full, PyramidInfer
from pyramidinfer.types import KVUsage, RequestMetrics, RequestOutput, SamplingParams, Trace

__all__ = [
    "LLM",
    "Full",
    "KVUsage",
    "PyramidInfer",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "Trace",
]
__version__ = "0.1.0"
