"""The real models, and prompts in real English."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pyramidinfer.engine.english import paragraphs
from pyramidinfer.lab.chat import Chat
from pyramidinfer.models.catalog import CATALOG, download, find_model
from pyramidinfer.models.loading import quiet_transformers
from pyramidinfer.types import TokenIds

MODELS = ("smollm2", "gemma3-270m")
QUESTION = "\n\nSay in one sentence what this text is about."


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests of one model run in one process, which then makes their fixtures once."""
    for item in items:
        name = item.callspec.params.get("name", "") if hasattr(item, "callspec") else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {name}".strip()))


@pytest.fixture(autouse=True, scope="session")
def quiet() -> None:
    quiet_transformers()
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    """A model that was fetched; where it was not, the test fails and says what to run."""
    find_model(request.param)
    return str(request.param)


@pytest.fixture(scope="session")
def gguf_file(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file that the model was converted from, downloaded again."""
    file = download(CATALOG[name], tmp_path_factory.mktemp(name))
    yield file
    file.unlink()


def real_prompts(tokenizer: object, count: int, least: int, most: int) -> list[TokenIds]:
    """Token ids of prompts with ``least`` to ``most`` tokens of English, evenly spread.

    Each begins at a paragraph of its own; a model with a chat template is asked a question about
    the text, another goes on with it.
    """
    chat, texts = Chat(tokenizer), paragraphs()
    prompts = []
    for number in range(count):
        wanted = least + (most - least) * number // (count - 1)
        first = len(texts) * number // count
        ids = chat.encode("\n\n".join(texts[first : first + 20]))
        text = chat.tokenizer.decode(ids[:wanted])
        prompts.append(chat.begin(text + QUESTION if chat.has_template else text))
    return prompts
