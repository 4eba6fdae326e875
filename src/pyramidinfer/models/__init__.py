"""The layer loop around Hugging Face decoder layers."""

from pyramidinfer.models.batch import Prefill
from pyramidinfer.models.families import FAMILIES
from pyramidinfer.models.loading import LoadedModel, load_model
from pyramidinfer.models.runner import ModelRunner

__all__ = ["FAMILIES", "LoadedModel", "ModelRunner", "Prefill", "load_model"]
