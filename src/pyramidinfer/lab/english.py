"""Real English text that is there without a download: the prose of Python's own documentation.

Every Python holds its language reference as plain text (``pydoc_data.topics``).  What is prose in
it, headings, code, grammar, tables and lists of versions left out, is some 30,000 words of written
English.  It is the same for the same Python; another minor version has other sentences.
"""

from __future__ import annotations

import re
import textwrap
from functools import lru_cache

__all__ = ["ENGLISH", "english", "paragraphs"]

#: What a result calls this text.
ENGLISH = "pydoc_data.topics (Python's language reference), prose only"
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

    found: dict[str, None] = {}
    for topic in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[topic]):
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
