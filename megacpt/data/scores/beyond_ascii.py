"""Replaces the characters beyond ASCII of UTF-8, at the speed of the bytes around them.

They are few in most corpora but stand everywhere, so that a loop over them would cost more than all the rest. Here the
characters of a text are looked up in one table, all at once, and written over what they replace.
"""

from collections.abc import Callable

import numpy as np

CONTROL = b"\x01"
"""What stands for bytes that are to be deleted."""
UNKNOWN, TOO_LONG = 0, 0xFFFFFFFF
"""Entries of the table that are no replacement: no UTF-8 holds the byte 255, and none here the byte 0."""
CODE_POINTS = 0x110000


class BeyondAscii:
    """Replaces each character beyond ASCII by what `replacement` says of it, a pure function.

    The table has a uint32 per code point: the UTF-8 of the replacement, filled up with CONTROL; it is filled in as
    characters are met.
    """

    def __init__(self, replacement: Callable[[str], str]) -> None:
        self._replacement = replacement
        self._table = np.zeros(CODE_POINTS, dtype=np.uint32)

    def replace(self, data: bytearray) -> bytearray:
        """The text `data` with each such character replaced, and CONTROL where it became shorter; `data` is used up."""
        text = np.frombuffer(data, dtype=np.uint8)
        places = np.flatnonzero(text >= 0x80)
        if not len(places):
            return data
        starts = places[text[places] >= 0xC0]
        width = 2 + (text[starts] >= 0xE0) + (text[starts] >= 0xF0)
        found = self._looked_up(_code_points(text, starts, width))
        if (found == TOO_LONG).any():
            return self._one_by_one(data)
        for place in range(4):
            wide = width > place
            text[starts[wide] + place] = (found[wide] >> np.uint32(8 * place)).astype(np.uint8)
        return data

    def _looked_up(self, points: np.ndarray) -> np.ndarray:
        found = self._table[points]
        if (found == UNKNOWN).any():
            for point in np.unique(points[found == UNKNOWN]).tolist():
                self._table[point] = self._entry(chr(point))
            found = self._table[points]
        return found

    def _entry(self, character: str) -> int:
        encoded = self._replacement(character).encode()
        if len(encoded) > len(character.encode()):
            return TOO_LONG
        return int.from_bytes(encoded.ljust(4, CONTROL), "little")

    def _one_by_one(self, data: bytearray) -> bytearray:
        """For texts with characters that become longer, such as Korean syllables, which are taken apart."""
        characters = list(data.decode())
        known = {character: self._replacement(character) for character in set(characters) if character > "\x7f"}
        return bytearray("".join([known.get(character, character) for character in characters]).encode())


def _code_points(text: np.ndarray, starts: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Code points of the characters of UTF-8 that begin at `starts`: int64 [characters]."""
    points = (text[starts] & (0xFF >> (width + 1))).astype(np.int64)
    for place in range(1, 4):
        wide = width > place
        points[wide] = (points[wide] << 6) | (text[starts[wide] + place] & 0x3F)
    return points
