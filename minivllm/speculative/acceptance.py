"""Acceptance: the share of one request's drafts that came true lately, and whether to go on guessing.

Every verification moves the rate towards its own share. Below the minimum the request pauses, and after PAUSE_TOKENS
one guess may open it again: text changes, from prose to a list that repeats, say.

Knows no draft. Called by engine/drafting.py. Twin in vLLM: none.
"""

from __future__ import annotations

WEIGHT = 0.2  # of the newest verification: about the last ten count
PAUSE_TOKENS = 32  # until the next probe: a wrong one then costs a few rows in one step of 32


class Acceptance:
    """Args:
    minimum: the rate below which drafts cost more than they save, 0 to 1.
    """

    def __init__(self, minimum: float):
        self.rate = 1.0  # nothing is known yet: seven misses in a row bring it below a quarter
        self._minimum = minimum
        self._paused_until = 0

    def observe(self, num_drafts: int, num_accepted: int, num_tokens: int) -> None:
        """One verification of num_drafts > 0; the request has num_tokens now."""
        self.rate += WEIGHT * (num_accepted / num_drafts - self.rate)
        if self.rate < self._minimum:
            self.rate = self._minimum  # so that the probe alone decides
            self._paused_until = num_tokens + PAUSE_TOKENS

    def allows(self, num_tokens: int) -> bool:
        """Whether a request of so many tokens should be guessed for."""
        return num_tokens >= self._paused_until
