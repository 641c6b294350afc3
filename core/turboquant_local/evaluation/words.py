"""Common words that stand for names in made-up facts."""

from __future__ import annotations

from typing import Final

_TEXT: Final = """
anchor apple arrow autumn badge bamboo barrel basket beacon bell blanket blossom bottle bridge bronze bucket
button cabin camel candle canyon carpet castle cedar cellar chain cherry circle cliff clock clover cobalt
copper coral cotton cradle crystal curtain daisy desert diamond dolphin dragon eagle ember engine falcon
feather fern fiddle flute forest fossil fountain garden ginger glacier granite hammer harbor harvest hazel
honey island ivory jacket jasmine jungle kettle ladder lantern lemon lily lizard magnet maple marble meadow
mirror mountain needle nest oak ocean olive orchard otter paddle panther pearl pepper piano pillow planet
pocket quartz rabbit raven ribbon river rocket saddle salmon scarf shadow shell silver sparrow spider stable
statue storm sugar sunset table temple thunder tiger timber tower tulip tunnel turtle valley velvet violet
walnut whistle willow window winter wolf
"""

WORDS: Final = tuple(_TEXT.split())
"""No two alike."""
