"""PyramidInfer: an inference engine in which fewer tokens are computed and fewer are kept."""

from pyramidinfer.engine.llm import LLM
from pyramidinfer.engine.prefix import Prefix
from pyramidinfer.policies import Full, Pyramid, PyramidInfer
from pyramidinfer.types import (
    KVUsage,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    Score,
    StructuredOutputsParams,
    Trace,
)

__all__ = [
    "LLM",
    "Full",
    "KVUsage",
    "Prefix",
    "Pyramid",
    "PyramidInfer",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "Score",
    "StructuredOutputsParams",
    "Trace",
]
__version__ = "0.1.0"
