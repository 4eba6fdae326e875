"""The layer loop around Hugging Face decoder layers."""

from pyramidinfer.models.adapter import Adapter
from pyramidinfer.models.families import FAMILIES
from pyramidinfer.models.intake import Intake
from pyramidinfer.models.loading import LoadedModel, load_model

__all__ = ["FAMILIES", "Adapter", "Intake", "LoadedModel", "load_model"]
