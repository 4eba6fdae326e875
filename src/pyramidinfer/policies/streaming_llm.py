"""StreamingLLM: attention sinks and a rolling window (Xiao et al., 2309.17453).

The first tokens and the newest ones stay, whatever they hold.  Positions are places inside the
cache: the engine turns the keys of what lies before a gap so that the cache looks contiguous, and
a request may generate past the model's positions (``streams``).

Deviations: the prompt attends in full before it is cut, as in the official streaming demo; rotated
keys are made from copies of the originals, so nothing accumulates.  Layers without rotary
positions are left alone.  Learned positions (OPT) cannot be rotated: there the tokens keep their
places in the text and a request ends at the model's last position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyramidinfer.config import check_whole, named_options
from pyramidinfer.policies.base import Forecast
from pyramidinfer.policies.retaining import Retaining
from pyramidinfer.types import Best, Layers, Needs, View

__all__ = ["StreamingLLM"]


@named_options
@dataclass(frozen=True)
class StreamingLLM(Retaining):
    """Sinks and a window.

    sinks : first tokens that stay.
    window : newest tokens that stay; with ``keep`` the budget less the sinks.
    keep : see ``Retaining``; held while generating.
    """

    name: ClassVar[str] = "streaming_llm"
    evicts: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    sinks: int = 4
    window: int = 1020

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("sinks", self.sinks, 0)
        check_whole("window", self.window, 1)

    def entries(self, text_len: int) -> int:
        return self.sinks + self.window

    def floor(self) -> int:
        return self.sinks + 1

    def needs(self, view: View) -> Needs:
        if not self.over(view):
            return Needs()
        limit = self.limit(view)
        room = max(1, (limit - self.sinks) // 2)  # protected spans leave so much to the window
        return Needs(retain=Best(limit, "new", sinks=self.sinks, room=room))

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        return super().forecast(prompt_len, max_new, layers)._replace(anchors=self.sinks)
