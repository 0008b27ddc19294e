"""Guess the next tokens from what was already said: texts that are read or repeated need no second model.

The last tokens are looked up in the prompt and the answer; what followed them there is the guess. A guess costs
nothing but a wider step, and wrong ones are thrown away: the answer is the same. Where guesses fail they become
shorter, and then rest.
"""

from __future__ import annotations

from collections.abc import Sequence

LENGTHS = (3, 2)  # of the pattern, the surest first
SHORTEST, LONGEST = 2, 16  # of a guess
PATIENCE = 3  # failures in a row before a rest
REST = 32  # tokens without a guess; doubled after each further rest without success


class Lookup:
    """The tokens of one sequence and where short patterns of them stood last."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._size = 4
        self._failures = 0
        self._rest = REST
        self._sleep_until = 0
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Take note of further tokens. A pattern is known once something has followed it."""
        for token in tokens:
            end = len(self._tokens)
            for length in LENGTHS:
                if end >= length:
                    self._after[tuple(self._tokens[end - length :])] = end
            self._tokens.append(token)

    def guess(self) -> list[int]:
        """What may come next; empty where nothing is known."""
        if len(self._tokens) < self._sleep_until:
            return []
        for length in LENGTHS:
            place = self._after.get(tuple(self._tokens[-length:]))
            if place is not None:
                return self._tokens[place : place + self._size]
        return []

    def judge(self, *, right: int, guessed: int) -> None:
        """Learn from a guess of which the first ``right`` tokens came true."""
        if 2 * right >= guessed:
            self._size = min(2 * self._size, LONGEST)
            self._failures, self._rest = 0, REST
            return
        self._size = max(self._size // 2, SHORTEST)
        self._failures += 1
        if self._failures >= PATIENCE:
            self._sleep_until = len(self._tokens) + self._rest
            self._failures, self._rest = 0, 2 * self._rest
