"""Who proposes tokens to a speculative decoder: drafts cost little, and the model decides."""

from collections.abc import Sequence

__all__ = ["NGram"]


class NGram:
    """Prompt lookup for one row: what followed the newest earlier occurrence of the text's last tokens.

    The longest match of `longest` to `shortest` tokens wins. A match that runs into the end of the text goes on in its
    own draft, as in a text that repeats itself.

    Source: github.com/apoorvumang/prompt-lookup-decoding; the matches are found by a table, not by a search.
    """

    def __init__(self, longest: int, shortest: int):
        self.sizes = range(longest, shortest - 1, -1)
        self._ends: dict[tuple[int, ...], int] = {}  # an n-gram -> where its newest occurrence ends
        self._known = 0  # ends before this one are in the table

    def draft(self, text: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow the text; the text must begin with that of the last call."""
        for end in range(self._known, len(text)):  # of what ends here the next token is known
            for size in self.sizes:
                if size <= end:
                    self._ends[tuple(text[end - size : end])] = end
        self._known = len(text)
        for size in self.sizes:
            start = self._ends.get(tuple(text[len(text) - size :])) if size <= len(text) else None
            if start is not None:
                period = len(text) - start
                return [text[start + i % period] for i in range(most)]
        return []
