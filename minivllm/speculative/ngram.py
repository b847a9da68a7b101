"""NgramTable: prompt lookup. What followed these last tokens the last time is what will follow them now, perhaps.

    ... 7 8 9 | 4 5 ...... 7 8 9        the last three tokens stood there before: drafts 4 5 ...

Good for edits, quotations, code and JSON, whose keys repeat; silent elsewhere. One table for one request, filled while
it runs: a token costs a few dictionary entries and never a walk over the text, however long it is.

Knows no model and no engine. Called by engine/drafting.py. Twin in vLLM: vllm/v1/spec_decode/ngram_proposer.py (which
searches the text each time).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice


class NgramTable:
    """Args:
    shortest, longest: tokens of the runs that are looked for; the longest run that is found wins.
    """

    def __init__(self, shortest: int, longest: int):
        self._lengths = range(longest, shortest - 1, -1)
        self._followers: dict[tuple[int, ...], int] = {}  # run of tokens -> where its newest follower stands
        self._num_known = 0  # the tokens that have been entered as followers

    def propose(self, token_ids: Sequence[int], num_drafts: int) -> list[int]:
        """Up to num_drafts guesses; none when the end of token_ids never stood there before.

        token_ids: all of the request's, which may only have grown since the last call. Where the earlier place is so
        near that its text runs into the end, the text is taken to go round.
        """
        for position in range(max(1, self._num_known), len(token_ids)):
            for length in self._lengths:
                if length <= position:
                    self._followers[tuple(token_ids[position - length : position])] = position
        self._num_known = len(token_ids)
        for length in self._lengths:
            follower = self._followers.get(tuple(token_ids[-length:]))
            if follower is not None:
                return list(islice(cycle(token_ids[follower : follower + num_drafts]), num_drafts))
        return []
