"""Lab: preempt. Make room when the cache is full.

Answers grow, and nobody knew how long they would be. When a running request needs a block and none is free, another one
gives way: it loses its blocks, goes back to the waiting line and will be computed again later. It is the one that
mattered least, the last that was admitted. So the oldest always goes on, and every request ends one day.

The engine does this in minivllm/core/scheduler.py (_grow, _preempt). Twin in vLLM: vllm/v1/core/sched/scheduler.py.
"""


def make_room(
    request_id: str,
    num_needed: int,
    num_free: int,
    running: list[str],
    waiting: list[str],
    tables: dict[str, list[int]],
) -> bool:
    """Preempt requests until `num_needed` blocks are free. True when `request_id` may go on.

    The victim is always the last of `running`, and that may be `request_id` itself: then it has given way, nothing is
    left to do for it in this step, and the answer is False.

    num_free: blocks that are free now. The blocks of a victim become free, but not those that another running request
        holds as well (they share a prefix).
    running, waiting: request ids in order; changed in place. A victim was there before all who wait, so it goes to the
        head of the line.
    tables: request id -> block ids, of the running requests; a victim has none any more. Changed in place.

        running = [A, B, C]   waiting = [D]   tables = {A: [1, 2], B: [1, 3], C: [1, 4]}
        make_room("A", 1, 0, ...)  ->  True       running = [A, B]   waiting = [C, D]
        block 4 has become free, block 1 has not
    """
    # --- your code
    while num_free < num_needed:
        victim = running.pop()
        blocks = tables.pop(victim)
        waiting.insert(0, victim)
        held = {block_id for table in tables.values() for block_id in table}
        num_free += sum(block_id not in held for block_id in blocks)
        if victim == request_id:
            return False
    return True
    # --- end
