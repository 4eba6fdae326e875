"""Real English text that is there without a download: the prose of Python's own documentation.

Every Python holds its language reference as plain text (``pydoc_data.topics``).  What is prose in
it, headings, code, grammar, tables and lists of versions left out, is some 30,000 words of written
English.  A second text, by other hands, is the prose of the docstrings of some modules of the
standard library, some 7,000 words.  Both are the same for the same Python; another minor version
has other sentences.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

__all__ = ["ENGLISH", "LIBRARY", "english", "library_paragraphs", "paragraphs"]

#: What a result calls these texts.
ENGLISH = "pydoc_data.topics (Python's language reference), prose only"
LIBRARY = "docstrings of Python's standard library, prose only"
#: The modules they are of: those that explain much and take little time to read.
MODULES = ("configparser", "difflib", "inspect", "shutil", "statistics", "threading")
#: A paragraph has so many words at least, and so large a share of letters, blanks and commas.
WORDS, PLAIN = 12, 0.94
MARK = re.compile(r"^(?:[*-]|\d+\.|[a-z]\.|\[\d+\])\s+")
NO_PROSE = re.compile(r"::=|>>>|^(?:Changed|New|Added|Deprecated|Removed|Raises an auditing)\b")


def english() -> str:
    """The text: paragraphs in the reference's order, a blank line between them."""
    return "\n\n".join(paragraphs())


@lru_cache(maxsize=1)
def paragraphs() -> tuple[str, ...]:
    """The text's paragraphs, each one line, none twice."""
    from pydoc_data.topics import topics  # half a megabyte, wanted by few

    return _all_prose(topics[topic] for topic in sorted(topics))


@lru_cache(maxsize=1)
def library_paragraphs() -> tuple[str, ...]:
    """The same of docstrings; empty where this Python came without its library's sources.

    The sources are read, never run.
    """
    return _all_prose(_docstrings())


def _docstrings() -> Iterator[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    for name in MODULES:
        try:
            tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def _all_prose(texts: Iterable[str]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for each in texts:
        for block in re.split(r"\n\s*\n", each):
            text = _prose(block)
            if text is not None:
                found[text] = None
    return tuple(found)


def _prose(block: str) -> str | None:
    """A block without its markup, as one line; None where it is no prose."""
    block = MARK.sub("", textwrap.dedent(block).strip())
    text = " ".join(block.split())
    text = re.sub(r'\*\*|``|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)|"|“|”', "", text)  # emphasis, code
    text = re.sub(r"\s?\[\d+\]", "", text)  # footnotes
    text = text.replace("’", "'").replace("–", "-")
    plain = sum(letter.isalpha() or letter in " ,.'" for letter in text)
    is_prose = (
        len(text.split()) >= WORDS
        and text[0].isupper()
        and text.endswith(".")
        and plain >= PLAIN * len(text)
        and not NO_PROSE.search(text)
    )
    return text if is_prose else None
