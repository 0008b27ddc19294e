"""How large a slice of reading may be: running answers wait for it, a moment and no longer."""

from __future__ import annotations

from collections.abc import Callable

STALL = 0.25  # seconds that running answers may wait for a slice, where a smaller one is possible
LEAST_TOKENS = 64  # fewer make a prompt much slower to read, and hardly a slice shorter
# Patches times blocks of the vision tower: 512 tokens of a 7B decoder cost as much.
LEAST_PATCHES, MOST_PATCHES = 1024, 16384


class Pace:
    """Learns from every slice how much fits ``STALL``. ``least``, ``most``: what a slice takes of its work."""

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = min(least, most), most
        self._fits = self._least

    def slice(self, *, hurried: bool) -> int:
        """How much to do at once; ``hurried``: somebody waits for the end of it."""
        return min(max(self._fits, self._least), self._most) if hurried else self._most

    def learn(self, amount: int, seconds: float) -> None:
        """Take note of what a slice took. Remainders say little: their time is overhead."""
        if amount >= self._least:
            self._fits = int(amount * STALL / seconds)


class Paces:
    """Of the two kinds of reading. ``hurried``: tells whether answers are running; ``chunk``: most tokens at once."""

    def __init__(self, hurried: Callable[[], bool], chunk: int) -> None:
        self._hurried, self._chunk = hurried, chunk
        self.tokens = Pace(LEAST_TOKENS, chunk)
        self.patches = Pace(LEAST_PATCHES, MOST_PATCHES)

    def most_tokens(self) -> int:
        """What one slice may take now."""
        return self.tokens.slice(hurried=self._hurried())

    def next_tokens(self, left: int) -> int:
        """Tokens of the next slice of a prompt that has ``left`` to be read: slices of one size, and no scrap.

        So a slice may be half as large again as what fits the moment.
        """
        slices = max(round(left / self.most_tokens()), -(-left // self._chunk))
        return -(-left // slices)

    def next_blocks(self, patches: int) -> int:
        """Blocks of the vision tower in the next slice of a picture with so many patches."""
        return max(self.patches.slice(hurried=self._hurried()) // patches, 1)
