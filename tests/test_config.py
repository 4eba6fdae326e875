"""Sizes, dtypes and nearest names."""

from __future__ import annotations

import pytest
import torch

from pyramidinfer.config import EngineConfig, nearest, parse_bytes, parse_dtype


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (7, 7),
        ("7", 7),
        ("2GiB", 2 * 2**30),
        ("2 gib", 2 * 2**30),
        ("1.5MB", 1_500_000),
        ("3K", 3072),
        ("4 TiB", 4 * 2**40),
        (" 8 B ", 8),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "2XB", "1 2", -5, 0, True, None, 1.5])
def test_what_is_not_a_size(text: object) -> None:
    with pytest.raises(ValueError, match="kv_memory="):
        parse_bytes(text)  # type: ignore[arg-type]


def test_auto_dtype_is_the_checkpoints() -> None:
    assert parse_dtype("auto", torch.bfloat16) == torch.bfloat16
    assert parse_dtype("auto", None) == torch.float32
    assert parse_dtype("float16", torch.bfloat16) == torch.float16


def test_nearest_offers_one_and_lists_all() -> None:
    assert nearest("ful", ["full", "h2o"]) == "did you mean 'full'? (choices: full, h2o)"
    assert nearest("zzz", ["full", "h2o"]) == "choices: full, h2o"


def test_config_is_frozen() -> None:
    config = EngineConfig(kv_memory="1MiB")
    assert config.kv_memory == 2**20
    with pytest.raises(AttributeError):
        config.page_size = 3  # type: ignore[misc]
