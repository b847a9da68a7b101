"""Lab: chunk_budget. Share the tokens of one step between requests.

A step computes a limited number of tokens: its budget. There is no prefill phase and no decode phase. A request is
behind by num_tokens - num_computed_tokens, and a step lets it catch up: by one token where it decodes, by a chunk of
its prompt where that is long.

    budget 64:   A  97 of  98 computed   -> 1
                 B 128 of 300 computed   -> 63     the rest of the budget; 109 are left for later steps
                 C   0 of  48 computed   -> nothing in this step

The engine does this in minivllm/core/scheduler.py (schedule, _clip).
Twin in vLLM: vllm/v1/core/sched/scheduler.py.
"""


def share_budget(
    running: list[tuple[str, int, int]], waiting: list[tuple[str, int, int]], budget: int, threshold: int
) -> dict[str, int]:
    """request id -> how many tokens this step computes, for every request that gets some.

    The running requests come first, in their order, so that whoever is reading an answer goes on reading; then the
    waiting ones in theirs.

    running, waiting: (request id, num_tokens, num_computed_tokens), with num_computed_tokens < num_tokens.
    budget: tokens of this step.
    threshold: no request gets more tokens than this in one step, so that one long prompt leaves room for others.
        0 means that there is no such limit, and it does not count either where there is one request only.

        share_budget([("A", 98, 97), ("B", 300, 128)], [("C", 48, 0)], 64, 0)   ->  {"A": 1, "B": 63}
        share_budget([("A", 98, 97), ("B", 300, 128)], [("C", 48, 0)], 64, 40)  ->  {"A": 1, "B": 40, "C": 23}
    """
    # --- your code
    shares = {}
    num_requests = len(running) + len(waiting)
    for request_id, num_tokens, num_computed_tokens in running + waiting:
        share = min(num_tokens - num_computed_tokens, budget)
        if threshold and num_requests > 1:
            share = min(share, threshold)
        if share > 0:
            shares[request_id] = share
            budget -= share
    return shares
    # --- end
