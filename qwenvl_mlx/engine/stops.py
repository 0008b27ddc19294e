"""End a text before a stop string, even where tokens cut the string to pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Feed pieces of text; what might be the beginning of a stop string is held back until it is known."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """The text that may go out now. After ``found`` is set, nothing more does."""
        if self.found:
            return ""
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        return next(
            (n for n in range(min(longest, len(text)), 0, -1) if self._begins_a_stop(text[-n:])),
            0,
        )

    def _begins_a_stop(self, ending: str) -> bool:
        return any(stop.startswith(ending) for stop in self._stops)
