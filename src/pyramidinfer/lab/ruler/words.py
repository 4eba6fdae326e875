"""Words for keys, lists and coded texts.

RULER draws its words from the ``wonderwords`` package.  Here, keys come from two short lists of our
own, and the numbered lists of common words from the vocabulary of Python's documentation.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable, Iterator
from functools import lru_cache

__all__ = [
    "ADJECTIVES",
    "NOUNS",
    "coded",
    "english_words",
    "number",
    "unlike",
    "uuid4",
    "word_keys",
]

ADJECTIVES = """
able aged amber ample arctic azure bald basic bitter bland blunt bold brave brief bright brisk
broad bronze busy calm candid careful cheap chilly civil clean clever cloudy clumsy coarse cold
cosy crimson crisp cruel curious damp daring dark dear deep dense dim distant dizzy double dry
dull dusty eager early earnest easy elder empty even exact faint fair famous fancy fast fierce
fine firm flat fluffy fond foreign formal frail frank free fresh frosty full funny gentle giant
glad global golden grand grave greedy green grim grumpy happy hard harsh hasty heavy hidden high
hollow honest huge humble hungry icy idle ivory jolly keen kind large lazy lean level light lively
lonely loud loyal lucky mellow merry mild modest muddy narrow neat nimble noble odd pale plain
polite proud quick quiet rapid rare rough round royal rusty sandy scarlet shy silent silver slim
smooth solid spare stark steep stern sturdy swift tall tame tender thin tidy timid tiny vast vivid
warm wary weary wild wise witty young zesty
""".split()

NOUNS = """
acorn anchor ankle apple arrow atlas badge bakery balcony banjo barrel basket beacon beaver bell
bench blanket boulder bridge broom bucket butter button cabin cactus camel candle canyon carpet
castle cellar chair cherry chimney circus clock cloud coast collar comet compass copper cottage
cousin cradle crane cricket crown curtain dagger daisy desert diary dolphin donkey dragon drawer
drum eagle elbow engine falcon farmer feather fence ferry fiddle forest fountain fox garden garlic
ginger glacier goose grape guitar hammer harbor harvest hedge helmet heron hinge honey horizon
hotel island jacket jewel journal jungle kettle kitchen kite ladder lagoon lantern lemon library
lizard locket lobster magnet maple market meadow melon mirror monkey mountain museum napkin needle
oasis ocean olive orchard otter oven owl paddle palace parrot pebble pencil pepper piano pigeon
pillow planet pocket pond potato puzzle rabbit raven ribbon river rocket saddle sailor salmon
school shadow shovel spider spoon statue stream sunset table teapot temple ticket tiger tower
trumpet tunnel turtle valley velvet village violin wagon walnut whale willow window winter wolf
""".split()


def number(rng: random.Random) -> str:
    """Seven digits, the first not 0."""
    return str(rng.randrange(1_000_000, 10_000_000))


def uuid4(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def coded(rng: random.Random, letters: int, alphabet: str) -> str:
    """A word of random letters."""
    return "".join(rng.choices(alphabet, k=letters))


def unlike(draw: Callable[[], str]) -> Iterator[str]:
    """An endless source of draws without repetition."""
    seen: set[str] = set()
    while True:
        found = draw()
        if found not in seen:
            seen.add(found)
            yield found


def word_keys(rng: random.Random) -> Callable[[], str]:
    """Draws keys, an adjective and a noun: "bold-otter"."""
    return lambda: f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


@lru_cache(maxsize=1)
def english_words() -> tuple[str, ...]:
    """The words of 3 to 10 lowercase letters in Python's documentation (``pydoc_data.topics``),
    sorted: about 2,500, the same for the same Python version."""
    from pydoc_data.topics import topics  # half a megabyte, rarely needed

    text = "\n".join(topics.values())
    return tuple(sorted(set(re.findall(r"(?<!\w)[a-z]{3,10}(?!\w)", text))))
