"""The labs about the scheduler: chunk_budget and preempt; their examples, and what the engine's scheduler does.

Knows no tensor. Listed in catalog.py. Twin in vLLM: none.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from minivllm.config import CacheConfig, SchedulerConfig
from minivllm.core.block_table import BlockTable
from minivllm.core.request import Request, RequestStatus
from minivllm.core.scheduler import Scheduler
from minivllm.labs.lab import Example, Lab, Mistake, Outcome, small_ones_first
from minivllm.sampling_params import SamplingParams

SEED = 20250612  # of every random example of this file
NUM_RANDOM = 40
Progress = tuple[str, int, int]  # request id, num_tokens, num_computed_tokens


# ------------------------------------------------------------------ chunk_budget
def request_with(request_id: str, num_tokens: int, num_computed_tokens: int) -> Request:
    """A request of the engine that is so far."""
    request = Request(request_id, [0] * num_tokens, SamplingParams(max_tokens=1), max_tokens=1)
    request.num_computed_tokens = num_computed_tokens
    return request


def share_budget_in_engine(running: list[Progress], waiting: list[Progress], budget: int, threshold: int) -> Outcome:
    """schedule() with blocks for everybody. Waiting requests have computed nothing."""
    config = SchedulerConfig(max_num_batched_tokens=budget, long_prefill_token_threshold=threshold, max_num_seqs=100)
    num_blocks = 2 + sum(num_tokens for _, num_tokens, _ in [*running, *waiting])
    scheduler = Scheduler(config, CacheConfig(block_size=4, enable_prefix_caching=False), num_blocks)
    for progress in running:
        request = request_with(*progress)
        scheduler.requests[request.request_id] = request
        scheduler.running.append(request)
        request.status = RequestStatus.RUNNING
        scheduler.kv_cache.tables[request.request_id] = BlockTable(4)
    for progress in waiting:
        scheduler.add_request(request_with(*progress))
    return {"returns": scheduler.schedule().num_scheduled_tokens}


def share_budget_examples() -> Iterator[Example]:
    """By hand, then random loads."""

    def case(about: str, running: list[Progress], waiting: list[Progress], budget: int, threshold: int = 0) -> Example:
        arguments = {"running": running, "waiting": waiting, "budget": budget, "threshold": threshold}
        return Example(about, arguments)

    a, b, c = ("A", 98, 97), ("B", 300, 128), ("C", 48, 0)
    yield case(
        "A is one token behind: it decodes. There is budget for much more, but nothing to spend it on.", [a], [], 64
    )
    yield case("B is 172 tokens behind, and the step has 64: it gets a chunk.", [b], [], 64)
    yield case("A takes 1 of the 64 and B all the others. C gets nothing, and has no entry.", [a, b], [c], 64)
    yield case("With a threshold of 40 B leaves 23 tokens to C.", [a, b], [c], 64, 40)
    yield case("B is alone: nobody waits for what the threshold would save.", [b], [], 64, 40)
    yield case("C waits, and there is room for all of it.", [a], [c], 64)
    yield case("Nobody runs. The first in line gets what it needs, the second the rest.", [], [c, ("D", 30, 0)], 64)
    chance = random.Random(SEED)
    found = []
    for _ in range(NUM_RANDOM):
        names = iter("ABCDEFGH")
        running = []
        for name, _ in zip(names, range(chance.randint(0, 4)), strict=False):
            num_tokens = chance.randint(1, 60)
            behind = 1 if chance.random() < 0.5 else chance.randint(1, num_tokens)
            running.append((name, num_tokens, num_tokens - behind))
        waiting = [
            (name, chance.randint(1, 60), 0) for name, _ in zip(names, range(chance.randint(0, 3)), strict=False)
        ]
        found.append(case("A random load.", running, waiting, chance.randint(1, 80), chance.choice((0, 0, 8, 20))))
    yield from small_ones_first(found)


CHUNK_BUDGET = Lab(
    name="chunk_budget",
    function="share_budget",
    title="one loop for decode, prefill and chunk: share the tokens of a step",
    engine="minivllm/core/scheduler.py, schedule and _clip",
    examples=share_budget_examples,
    expected=share_budget_in_engine,
    mistakes=(
        Mistake(
            "running + waiting:",
            "waiting + running:",
            "It serves the waiting requests first. Whoever is in the middle of an answer then stops for as long as a "
            "new prompt takes; running requests come first.",
        ),
        Mistake(
            "min(num_tokens - num_computed_tokens, budget)",
            "min(num_tokens, budget)",
            "It schedules all tokens of a request, also those whose keys and values are in the cache already. A "
            "request is behind by num_tokens - num_computed_tokens.",
        ),
        Mistake(
            "            budget -= share\n",
            "",
            "It gives every request the whole budget. What one gets, the next ones do not have: the step would compute "
            "more tokens than it may.",
        ),
        Mistake(
            "min(num_tokens - num_computed_tokens, budget)",
            "num_tokens - num_computed_tokens if num_tokens - num_computed_tokens <= budget else 0",
            "A request whose tokens do not all fit gets none of them. It may take as many as are left, a chunk, and "
            "the others in later steps; a prompt longer than the budget would never start.",
        ),
        Mistake(
            "        if share > 0:\n            shares[request_id] = share\n            budget -= share\n",
            "        shares[request_id] = share\n        budget -= share\n",
            "It has entries of 0 tokens for those that got nothing. They are not part of the step: the model runner "
            "would build a row without a token for each.",
        ),
        Mistake(
            "if threshold and num_requests > 1:",
            "if threshold:",
            "It applies the threshold to a request that is alone. There is nobody to leave room for; its prompt would "
            "only take more steps.",
        ),
        Mistake(
            "        if threshold and num_requests > 1:\n            share = min(share, threshold)\n",
            "",
            "It knows no threshold. One long prompt takes all of the budget, step after step, and short ones behind it "
            "wait for the whole of it.",
        ),
        Mistake(
            "            share = min(share, threshold)\n",
            "            share = threshold\n",
            "It raises small shares to the threshold. That is a limit, not a quantity: a request never gets more "
            "tokens than it is behind, nor more than are left.",
        ),
    ),
)


# ------------------------------------------------------------------ preempt
def make_room_in_engine(
    request_id: str,
    num_needed: int,
    num_free: int,
    running: list[str],
    waiting: list[str],
    tables: dict[str, list[int]],
) -> Outcome:
    """schedule() where this request alone needs blocks. A block is one token here, so the others stand still."""
    num_blocks = 1 + num_free + len({block_id for table in tables.values() for block_id in table})
    config = SchedulerConfig(max_num_seqs=len(running), max_num_batched_tokens=10_000)
    scheduler = Scheduler(config, CacheConfig(block_size=1, enable_prefix_caching=False), num_blocks)
    ids = sorted({block_id for table in tables.values() for block_id in table})
    blocks = dict(zip(ids, scheduler.kv_cache.pool.get_new_blocks(len(ids)), strict=True))
    for block in blocks.values():
        block.ref_cnt = 0
    for name in running:
        num_tokens = len(tables[name])
        request = request_with(name, num_tokens + (num_needed if name == request_id else 0), num_tokens)
        request.status = RequestStatus.RUNNING
        scheduler.requests[name] = request
        scheduler.running.append(request)
        table = scheduler.kv_cache.tables[name] = BlockTable(1)
        table.blocks = [blocks[block_id] for block_id in tables[name]]
        for block in table.blocks:
            block.ref_cnt += 1
    for name in waiting:
        scheduler.add_request(request_with(name, 1, 0))
    scheduler.schedule()
    still = [request.request_id for request in scheduler.running]
    return {
        "returns": request_id in still,
        "running": still,
        "waiting": [request.request_id for request in scheduler.waiting],
        "tables": {name: tables[name] for name in still},
    }


def make_room_examples() -> Iterator[Example]:
    """By hand, then random tables with shared prefixes."""

    def case(
        about: str, who: str, needed: int, free: int, tables: dict[str, list[int]], waiting: list[str] | None = None
    ) -> Example:
        arguments = {"request_id": who, "num_needed": needed, "num_free": free, "running": list(tables)}
        return Example(about, {**arguments, "waiting": waiting or [], "tables": tables})

    three = {"A": [1, 2], "B": [3], "C": [4, 5]}
    yield case("Enough is free: nobody gives way.", "A", 1, 1, three)
    yield case("C was admitted last, so it is C that gives way to A.", "A", 1, 0, three)
    yield case(
        "C has computed more than D, who waits and has computed nothing: C goes before D.", "A", 1, 0, three, ["D"]
    )
    yield case(
        "C alone does not have enough blocks. Then B gives way as well, and stands before C.", "A", 3, 0, three, ["D"]
    )
    yield case("C itself needs a block, and C is the last: C gives way, and the older ones go on.", "C", 1, 0, three)
    yield case("B needs four blocks. C goes; it is not enough; B is the last now, and goes itself.", "B", 4, 0, three)
    shared = {"A": [1, 2], "B": [1, 3], "C": [1, 4]}
    yield case("C shares block 1 with A and B: only block 4 becomes free. It is enough here.", "A", 1, 0, shared)
    yield case("C frees one block, not two, because the others still hold block 1.", "A", 2, 0, shared)
    yield case("B and C share block 3: it is free when both have gone.", "A", 2, 0, {"A": [1], "B": [2, 3], "C": [3]})
    yield from small_ones_first(random_tables(random.Random(SEED)))


def random_tables(chance: random.Random) -> Iterator[Example]:
    """Requests that share the beginnings of their tables."""
    for _ in range(NUM_RANDOM):
        prefix = list(range(1, 1 + chance.randint(0, 3)))
        following = len(prefix) + 1
        tables: dict[str, list[int]] = {}
        for name in "ABCDE"[: chance.randint(1, 5)]:
            own = chance.randint(1, 3)
            table = prefix[: chance.randint(0, len(prefix))]
            tables[name] = [*table, *range(following, following + own)]
            following += own
        who = chance.choice(list(tables))
        used = {block_id for table in tables.values() for block_id in table}
        numbers = {block_id: number for number, block_id in enumerate(sorted(used), 1)}
        tables = {name: [numbers[block_id] for block_id in table] for name, table in tables.items()}
        arguments = {"request_id": who, "num_needed": chance.randint(1, 5), "num_free": chance.randint(0, 2)}
        lists = {"running": list(tables), "waiting": ["X", "Y"][: chance.randint(0, 2)], "tables": tables}
        yield Example("Random tables; some share their first blocks.", {**arguments, **lists})


PREEMPT = Lab(
    name="preempt",
    function="make_room",
    title="the cache is full: who gives way, and where it waits",
    engine="minivllm/core/scheduler.py, _grow and _preempt",
    examples=make_room_examples,
    expected=make_room_in_engine,
    changes=("running", "waiting", "tables"),
    mistakes=(
        Mistake(
            "victim = running.pop()",
            "victim = running.pop(0)",
            "It preempts the oldest request. Then nobody is safe: two long requests can throw each other out for ever, "
            "each time losing all that was computed. The last one admitted gives way, so the oldest always ends.",
        ),
        Mistake(
            "victim = running.pop()",
            "victim = running.pop(-1 if running[-1] != request_id or len(running) == 1 else -2)",
            "It never lets the request itself give way, and takes an older one instead. The last one admitted is the "
            "victim, also when it is the one that needs the block.",
        ),
        Mistake(
            "waiting.insert(0, victim)",
            "waiting.append(victim)",
            "It sends the victim to the end of the line. It was there before everybody who waits now: it goes to the "
            "head, or new requests overtake it again and again.",
        ),
        Mistake(
            "sum(block_id not in held for block_id in blocks)",
            "len(blocks)",
            "It counts all blocks of the victim as free. A block that another running request holds too (their prompts "
            "begin alike) stays where it is, ref_cnt goes down and not to 0: you would give one block to two requests.",
        ),
        Mistake(
            "while num_free < num_needed:",
            "if num_free < num_needed:",
            "It preempts one request and stops. One victim's blocks may not be enough: go on until they are.",
        ),
        Mistake(
            "        if victim == request_id:\n            return False\n",
            "",
            "When the request itself was the victim it goes on, and in the end says True or finds nobody left. Once it "
            "has given way it has no blocks and no place in this step: the answer is False.",
        ),
        Mistake(
            "blocks = tables.pop(victim)",
            "blocks = tables[victim]",
            "The victim keeps its block table. Its blocks belong to others soon; when it comes back it gets new ones.",
        ),
    ),
)
