"""Every policy on three families: a second turn is the same from pool, host memory, disk and after
a restart."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.engine import test_offload as short
from tests.engine.serving import NAMES


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
@pytest.mark.parametrize("name", NAMES)
def test_every_policy_from_everywhere(name: str, family: str, tmp_path: Path) -> None:
    short.test_the_second_turn_is_the_same_from_anywhere(name, family, tmp_path)
