"""RULER's long-context tasks, and the study that asks them under compression."""

from __future__ import annotations

__all__: list[str] = []
