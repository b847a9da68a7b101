"""What students write: (lab, file, words of the message that it must get)."""

ALLOCATE = "def allocate(free_queue, ref_cnt, block_hash, count):\n"
APPEND = "def append_slot(block_table, num_tokens, block_size, free_queue):\n"
PREFIX = "from minivllm.core.block_hash import *\ndef find_prefix(token_ids, block_size, salt, cached):\n"
BUDGET = "def share_budget(running, waiting, budget, threshold):\n"
ROOM = "def make_room(request_id, num_needed, num_free, running, waiting, tables):\n"
ATTEND = "import math, torch\ndef attend(tiles, size):\n"
TOP_P = "import torch\ndef top_p(logits, temperature, p):\n"
VERIFY = (
    "from minivllm.sample.top_k_top_p import inverse_cdf\nimport numpy as np\n"
    "def verify(draft_token_ids, draft_probs, target_probs, accept_uniforms, draw_uniform):\n"
)

WRONG_ANSWERS = [
    (
        "allocate",
        f"""{ALLOCATE}
    if len(free_queue) < count:
        return None
    taken = free_queue[:count]
    del free_queue[:count]
    for block_id in taken:
        ref_cnt[block_id] += 1
    return taken
""",
        "leaves the hashes",
    ),
    (
        "allocate",
        f"""{ALLOCATE}
    taken = free_queue[:count]
    free_queue[:] = free_queue[count:]
    for block_id in taken:
        ref_cnt[block_id] += 1
        if block_id in block_hash:
            del block_hash[block_id]
    return taken
""",
        "all or none",
    ),
    (
        "allocate",
        f"""{ALLOCATE}
    if len(free_queue) < count:
        return None
    taken = [free_queue.pop() for _ in range(count)]
    for block_id in taken:
        ref_cnt[block_id] = 1
        block_hash.pop(block_id, None)
    return taken
""",
        "from the right end",
    ),
    ("append_slot", f"{APPEND}    return num_tokens\n", "gives the position, not the slot"),
    (
        "append_slot",
        f"""{APPEND}
    offset = num_tokens % block_size
    if offset == 0:
        block_table.append(free_queue.pop(0))
    return block_table[-1] * block_size + offset
""",
        "does not ask whether a block is free",
    ),
    (
        "prefix_hash",
        f"""{PREFIX}
    found = []
    for start in range(0, len(token_ids) - 1, block_size):
        block = token_ids[start:start + block_size]
        if start + block_size >= len(token_ids):
            break
        name = hash_block(ROOT_HASH, block, salt if not start else None)
        if name not in cached:
            return found
        found.append(cached[name])
    return found
""",
        "hashes the tokens of each block alone",
    ),
    (
        "prefix_hash",
        f"""{PREFIX}
    found, name = [], ROOT_HASH
    while (len(found) + 1) * block_size <= len(token_ids):
        start = len(found) * block_size
        name = hash_block(name, token_ids[start:start + block_size], None if found else salt)
        if name not in cached:
            return found
        found.append(cached[name])
    return found
""",
        "leave the last token",
    ),
    (
        "chunk_budget",
        f"""{BUDGET}
    out = {{}}
    for name, total, done in waiting + running:
        n = min(total - done, budget, threshold if threshold and len(running + waiting) > 1 else budget)
        if n:
            out[name] = n
        budget -= n
    return out
""",
        "serves the waiting requests first",
    ),
    (
        "chunk_budget",
        f"""{BUDGET}
    out = {{}}
    for name, total, done in running + waiting:
        n = min(total - done, budget)
        if n:
            out[name] = n
        budget -= n
    return out
""",
        "knows no threshold",
    ),
    (
        "chunk_budget",
        f"""{BUDGET}
    out = {{}}
    for name, total, done in running + waiting:
        n = total - done
        if n <= budget:
            out[name] = n
            budget -= n
    return out
""",
        "do not all fit gets none",
    ),
    (
        "preempt",
        f"""{ROOM}
    while num_free < num_needed:
        name = running[-1]
        running.remove(name)
        waiting.insert(0, name)
        num_free += len(tables.pop(name))
        if name == request_id:
            return False
    return True
""",
        "counts all blocks of the victim as free",
    ),
    (
        "preempt",
        f"""{ROOM}
    while num_free < num_needed:
        name = running.pop(0)
        waiting.insert(0, name)
        mine = set(tables.pop(name))
        num_free += len(mine.difference(*tables.values()))
        if name == request_id:
            return False
    return True
""",
        "preempts the oldest request",
    ),
    (
        "preempt",
        f"""{ROOM}
    while num_free < num_needed:
        name = running.pop()
        waiting.append(name)
        mine = set(tables.pop(name))
        num_free += len(mine.difference(*tables.values()))
        if name == request_id:
            return False
    return True
""",
        "to the end of the line",
    ),
    (
        "online_softmax",
        f"""{ATTEND}
    top, bottom = torch.zeros(size, dtype=torch.float64), 0.0
    for scores, values in tiles:
        w = torch.tensor(scores, dtype=torch.float64).exp()
        top += w @ torch.tensor(values, dtype=torch.float64)
        bottom += w.sum()
    return top / bottom
""",
        "takes exp(score) as it is",
    ),
    (
        "online_softmax",
        f"""{ATTEND}
    m, top, bottom = -math.inf, torch.zeros(size, dtype=torch.float64), 0.0
    for scores, values in tiles:
        s = torch.tensor(scores, dtype=torch.float64)
        m = max(m, float(s.max()))
        if m == -math.inf:
            continue
        w = (s - m).exp()
        top += w @ torch.tensor(values, dtype=torch.float64)
        bottom += w.sum()
    return top / bottom
""",
        "never corrects the sums",
    ),
    (
        "online_softmax",
        f"""{ATTEND}
    m, top, bottom = -math.inf, torch.zeros(size, dtype=torch.float64), 0.0
    for scores, values in tiles:
        s = torch.tensor(scores, dtype=torch.float64)
        new = max(m, float(s.max()))
        c = math.exp(m - new)
        m = new
        w = (s - m).exp()
        top = top * c + w @ torch.tensor(values, dtype=torch.float64)
        bottom = bottom * c + w.sum()
    return top / bottom
""",
        "breaks when all keys so far are hidden",
    ),
    (
        "top_p",
        f"""{TOP_P}
    probs = torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, 0)
    values, ids = probs.sort(descending=True, stable=True)
    kept = values.cumsum(0) <= p
    kept[0] = True
    values = values[kept] / values[kept].sum()
    return dict(zip(ids[kept].tolist(), values.tolist()))
""",
        "drops the token that crosses the share",
    ),
    (
        "top_p",
        f"""{TOP_P}
    probs = torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, 0)
    values, ids = probs.sort(descending=True, stable=True)
    kept = values.cumsum(0) - values < p
    return dict(zip(ids[kept].tolist(), values[kept].tolist()))
""",
        "do not sum up to 1",
    ),
    (
        "top_p",
        f"""{TOP_P}
    probs = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0)
    values, ids = probs.sort(descending=True, stable=True)
    kept = values.cumsum(0) - values < p
    values = values[kept] / values[kept].sum()
    return dict(zip(ids[kept].tolist(), values.tolist()))
""",
        "does not divide the logits by the temperature",
    ),
    (
        "rejection_sampling",
        f"""{VERIFY}
    out = []
    for x, q, t, u in zip(draft_token_ids, draft_probs, target_probs, accept_uniforms):
        if u < t[x] / q[x]:
            out.append(x)
        else:
            return out + [inverse_cdf(np.array(t), draw_uniform)]
    return out + [inverse_cdf(np.array(target_probs[-1]), draw_uniform)]
""",
        "it draws from the target",
    ),
    (
        "rejection_sampling",
        f"""{VERIFY}
    out = []
    for x, q, t, u in zip(draft_token_ids, draft_probs, target_probs, accept_uniforms):
        if u < min(1, t[x] / q[x]):
            out.append(x)
        else:
            return out + [inverse_cdf(np.maximum(0, np.array(t) - np.array(q)), draw_uniform)]
    return out
""",
        "When all drafts are accepted it stops",
    ),
    (
        "rejection_sampling",
        f"""{VERIFY}
    out = []
    for x, q, t, u in zip(draft_token_ids, draft_probs, target_probs, accept_uniforms):
        if u < t[x]:
            out.append(x)
        else:
            return out + [inverse_cdf(np.maximum(0, np.array(t) - np.array(q)), draw_uniform)]
    return out + [inverse_cdf(np.array(target_probs[-1]), draw_uniform)]
""",
        "accepts with probability target[x]",
    ),
]
