"""Policies, which decide what the cache keeps: one file per method, one line each in the
registry."""

from pyramidinfer.policies.base import Forecast, Policy
from pyramidinfer.policies.chunkkv import ChunkKV
from pyramidinfer.policies.duo import Duo
from pyramidinfer.policies.expected_attention import ExpectedAttention
from pyramidinfer.policies.fastkv import FastKV
from pyramidinfer.policies.full import Full
from pyramidinfer.policies.h2o import H2O
from pyramidinfer.policies.keydiff import KeyDiff
from pyramidinfer.policies.kvzip import KVzip
from pyramidinfer.policies.lossless import Lossless, choose_policy
from pyramidinfer.policies.profile import Profile
from pyramidinfer.policies.pyramid import Pyramid
from pyramidinfer.policies.pyramidinfer import PyramidInfer
from pyramidinfer.policies.pyramidkv import PyramidKV
from pyramidinfer.policies.registry import POLICIES, make_policy
from pyramidinfer.policies.rkv import RKV
from pyramidinfer.policies.scissorhands import Scissorhands
from pyramidinfer.policies.snapkv import SnapKV
from pyramidinfer.policies.streaming_llm import StreamingLLM
from pyramidinfer.policies.tova import TOVA
from pyramidinfer.policies.triattention import TriAttention

__all__ = [
    "H2O",
    "POLICIES",
    "RKV",
    "TOVA",
    "ChunkKV",
    "Duo",
    "ExpectedAttention",
    "FastKV",
    "Forecast",
    "Full",
    "KVzip",
    "KeyDiff",
    "Lossless",
    "Policy",
    "Profile",
    "Pyramid",
    "PyramidInfer",
    "PyramidKV",
    "Scissorhands",
    "SnapKV",
    "StreamingLLM",
    "TriAttention",
    "choose_policy",
    "make_policy",
]
