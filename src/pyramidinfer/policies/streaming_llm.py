"""StreamingLLM: attention sinks and a rolling window (Xiao et al., 2309.17453).

The first tokens (attention sinks) and the newest tokens stay, whatever their content.  A token's
position is its place in the cache: the engine rotates the keys before a gap again, so that the
cache looks contiguous, and a request may generate past the model's last position (``streams``).

Deviations: the prompt is prefilled with full attention before it is cut, as in the official
streaming demo.  Rotated keys are always made from the original keys, so rounding errors do not
accumulate.  Layers without rotary positions are not rotated.  Learned positions (OPT) cannot be
rotated: tokens keep their positions in the text, and a request ends at the model's last position.
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
    """Attention sinks and a window of the newest tokens.

    sinks : number of first tokens that stay.
    window : number of newest tokens that stay; with ``keep``, the budget minus the sinks.
    keep : see ``Retaining``; the budget also holds during generation.
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
        room = max(1, (limit - self.sinks) // 2)  # what protected spans leave for the window
        return Needs(retain=Best(limit, "new", sinks=self.sinks, room=room))

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        return super().forecast(prompt_len, max_new, layers)._replace(anchors=self.sinks)
