"""The engine: admission, steps, sampling, answers."""

from pyramidinfer.engine.engine import Engine
from pyramidinfer.engine.launch import RanksError
from pyramidinfer.engine.llm import LLM, Interrupted
from pyramidinfer.engine.prefix import Prefix

__all__ = ["LLM", "Engine", "Interrupted", "Prefix", "RanksError"]
