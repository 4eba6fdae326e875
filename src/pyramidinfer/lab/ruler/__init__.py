"""RULER's long-context tasks, and the study that asks them under compression."""

from pyramidinfer.lab.ruler.haystack import Haystack
from pyramidinfer.lab.ruler.sample import Sample
from pyramidinfer.lab.ruler.tasks import TASKS, check_task, make_samples

__all__ = ["TASKS", "Haystack", "Sample", "check_task", "make_samples"]
