"""top_k_top_p_sample in Triton: no sort. A bound, the few tokens above it, and searches for a threshold among those.

    candidates_kernel (row)   pass 1: LANES running maxima and sums ──▶ max, total weight ──▶ a bound
                              pass 2: tokens at or above the bound, as keys, side by side
    draw_kernel (row)         search top_k's threshold ─▶ top_p's ─▶ the draw's; all three are "how far down must one
                              go until the keys above weigh enough?"

A lane's maximum is a real token. So the k-th largest of the lanes' maxima is reached by k tokens or more, and when the
maxima above a value weigh top_p of the total, so do the tokens above it: such a value is a bound below which nothing is
kept. Where no lane says so, top_p cannot keep a token lighter than (1 - top_p) / vocab_size of the total.

A *key* is an integer: the logit's bits, turned so that integers order as floats do, above the id turned around. Keys
are distinct, and their order is (logit descending, id ascending), so a threshold cuts between any two tokens, and a
search halves the range of integers until one key is left. Weights are fp32 and their sums float64, added in an order
that no other row can change.

Called by the package on GPU tensors. Twin in vLLM: v1/sample/ops/topk_topp_triton.py, which searches pivots as well.
"""

import torch
import triton
import triton.language as tl

from minivllm.kernels.build import Build, Workload
from minivllm.kernels.dispatch import warp_size

LANES = 4096
KEYS = 1024
NUM_THREADS = 512
DRAW_THREADS = 256
ID_BITS = tl.constexpr(20)
ID_MASK = tl.constexpr((1 << 20) - 1)
MAX_VOCAB_SIZE = 1 << 20
SIGN_MASK = tl.constexpr(0x7FFFFFFF)
NO_KEY = tl.constexpr(-(2**63))  # below every key
COARSE = tl.constexpr(1 << 16)  # steps of a float's bits: a bound within 1 %; it need not be exact
BELOW_ONE = tl.constexpr(0.9999999999999998)


# ------------------------------------------------------------------ keys and settings
@triton.jit
def _ordered(logits):
    """int32, in the order of the floats; -0.0 is 0.0."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ SIGN_MASK, bits)


@triton.jit
def _weights_of(keys, largest, scale):
    """fp32, of the logits in the keys, at most 1: what is no key may be anything."""
    ordered = (keys >> ID_BITS).to(tl.int32)
    logits = tl.where(ordered < 0, ordered ^ SIGN_MASK, ordered).to(tl.float32, bitcast=True)
    return tl.exp2(tl.minimum((logits - largest) * scale, 0.0))


@triton.jit
def _settings(row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size):
    """(temperature, top_k, top_p, min_p). Greedy is: the equals of the largest, of which top_p 0 keeps the first."""
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    is_greedy = temperature == 0.0
    return (
        tl.where(is_greedy, 1.0, temperature),
        tl.where(is_greedy | (top_k >= vocab_size), 0, top_k),
        tl.where(is_greedy, 0.0, tl.load(top_p_ptr + row)),
        tl.where(is_greedy, 1.0, tl.load(min_p_ptr + row)),
    )


# ------------------------------------------------------------------ candidates
@triton.jit
def _lane_bound(ordered, weights, need):
    """A value, as `_ordered`, at or above which the lanes weigh `need`; the lowest int32 if all together do not."""
    low = tl.min(ordered, axis=0).to(tl.int64)
    high = tl.max(ordered, axis=0).to(tl.int64) + 1
    if tl.sum(weights.to(tl.float64), axis=0) < need:
        low = tl.full([], -(2**31), tl.int64)
        high = low
    while high - low > COARSE:
        middle = low + (high - low) // 2
        is_enough = tl.sum(tl.where(ordered >= middle, weights, 0.0).to(tl.float64), axis=0) >= need
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
    return low


@triton.jit
def candidates_kernel(
    logits_ptr,  # [num_reqs, vocab_size]
    temperature_ptr,  # [num_reqs] fp64
    top_k_ptr,  # [num_reqs] int32
    top_p_ptr,  # [num_reqs] fp64
    min_p_ptr,  # [num_reqs] fp64
    keys_ptr,  # [num_reqs, max_keys] int64
    num_keys_ptr,  # [num_reqs] int32; -1: no distribution
    largest_ptr,  # [num_reqs]
    total_ptr,  # [num_reqs] fp64, the weight of all tokens
    logits_stride,  # between rows
    max_keys,
    vocab_size,
    LANES: tl.constexpr,
):
    """One row. Nothing restricts: no keys."""
    row = tl.program_id(0).to(tl.int64)
    temperature, top_k, top_p, min_p = _settings(row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size)
    scale = (1.4426950408889634 / temperature).to(tl.float32)  # weights are powers of 2
    lanes = tl.arange(0, LANES)
    row_ptr = logits_ptr + row * logits_stride

    maxima = tl.full([LANES], float("-inf"), tl.float32)
    sums = tl.zeros([LANES], tl.float32)
    broken = tl.zeros([LANES], tl.int32)
    for first in range(0, vocab_size, LANES):
        tokens = first + lanes
        logits = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("-inf"))  # [LANES]
        is_broken = (logits != logits) | (logits == float("inf"))
        broken |= is_broken.to(tl.int32)
        logits = tl.where(is_broken, float("-inf"), logits)
        new_maxima = tl.maximum(maxima, logits)
        safe = tl.where(new_maxima == float("-inf"), 0.0, new_maxima)
        sums = sums * tl.exp2((maxima - safe) * scale) + tl.exp2((logits - safe) * scale)
        maxima = new_maxima
    largest = tl.max(maxima, axis=0)
    tl.store(num_keys_ptr + row, tl.where((tl.max(broken, axis=0) > 0) | (largest == float("-inf")), -1, 0))
    if (tl.max(broken, axis=0) > 0) | (largest == float("-inf")):
        return
    weights = tl.exp2((maxima - largest) * scale)  # [LANES], of the maxima
    total = tl.sum((sums * weights).to(tl.float64), axis=0)
    tl.store(largest_ptr + row, largest)
    tl.store(total_ptr + row, total)

    bound = tl.full([], -(2**31), tl.int64)
    lightest = tl.full([], 0.0, tl.float64)
    if top_k > 0:
        bound = _lane_bound(_ordered(maxima), tl.full([LANES], 1.0, tl.float32), top_k.to(tl.float64))
    if min_p > 0.0:  # exact: this is all that min_p asks
        floor = largest + (temperature * tl.log(min_p)).to(tl.float32)
        bound = tl.maximum(bound, _ordered(floor).to(tl.int64))
    if (top_k <= 0) & (min_p <= 0.0):
        if top_p >= 1.0:
            return
        bound = _lane_bound(_ordered(maxima), weights, top_p * total)
        if bound == -(2**31):
            lightest = 0.999 * (1.0 - top_p) * total / vocab_size  # a little low: total is rounded

    num_keys = tl.full([], 0, tl.int32)
    for first in range(0, vocab_size, LANES):
        tokens = first + lanes
        logits = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("-inf"))  # [LANES]
        ordered = _ordered(logits)
        is_kept = (ordered >= bound) & (logits > float("-inf"))
        is_kept &= tl.exp2((logits - largest) * scale) >= lightest
        kept = is_kept.to(tl.int32)
        keys = (ordered.to(tl.int64) << ID_BITS) | (tokens ^ ID_MASK).to(tl.int64)
        tl.store(keys_ptr + row * max_keys + num_keys + tl.cumsum(kept, axis=0) - 1, keys, mask=is_kept)
        num_keys += tl.sum(kept, axis=0)
    tl.store(num_keys_ptr + row, num_keys)


# ------------------------------------------------------------------ the draw
@triton.jit
def _weigh(keys_ptr, num_keys, threshold, largest, scale, BY_COUNT: tl.constexpr, KEYS: tl.constexpr):
    """How much the keys at or above the threshold weigh, or how many they are: fp64."""
    sums = tl.zeros([KEYS], tl.float64)
    for first in range(0, num_keys, KEYS):
        places = first + tl.arange(0, KEYS)
        keys = tl.load(keys_ptr + places)  # behind the last key anything: a mask would make these loads narrow
        is_above = (places < num_keys) & (keys >= threshold)
        keys = tl.where(is_above, keys, 0)
        weights = tl.full([KEYS], 1.0, tl.float32) if BY_COUNT else _weights_of(keys, largest, scale)
        sums += tl.where(is_above, weights, 0.0).to(tl.float64)
    return tl.sum(sums, axis=0)


@triton.jit
def _search(
    keys_ptr,
    num_keys,
    low,
    high,
    need,
    largest,
    scale,
    BY_COUNT: tl.constexpr,
    STRICT: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The largest threshold in [low, high) whose keys weigh `need` (STRICT: more than that); low if none does."""
    while high - low > 1:
        middle = low + (high - low) // 2
        weight = _weigh(keys_ptr, num_keys, middle, largest, scale, BY_COUNT, KEYS)
        is_enough = weight > need if STRICT else weight >= need
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
    return low


@triton.jit
def _ends(keys_ptr, num_keys, KEYS: tl.constexpr):
    """The smallest key, and the largest one + 1."""
    low = tl.full([KEYS], 2**63 - 1, tl.int64)
    high = tl.full([KEYS], NO_KEY, tl.int64)
    for first in range(0, num_keys, KEYS):
        places = first + tl.arange(0, KEYS)
        keys = tl.load(keys_ptr + places)
        low = tl.minimum(low, tl.where(places < num_keys, keys, 2**63 - 1))
        high = tl.maximum(high, tl.where(places < num_keys, keys, NO_KEY))
    return tl.min(low, axis=0), tl.max(high, axis=0) + 1


@triton.jit
def _tile(row_ptr, first, vocab_size, largest, scale, LANES: tl.constexpr):
    """The weights of LANES tokens: fp64."""
    tokens = first + tl.arange(0, LANES)
    logits = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("-inf"))
    return tl.exp2((logits - largest) * scale).to(tl.float64)


@triton.jit
def _draw_by_id(row_ptr, vocab_size, uniform, largest, scale, LANES: tl.constexpr):
    """Inverse CDF over the whole vocabulary: first the tile, then the token in it."""
    total = tl.full([], 0.0, tl.float64)
    for first in range(0, vocab_size, LANES):
        total += tl.sum(_tile(row_ptr, first, vocab_size, largest, scale, LANES), axis=0)
    target = tl.minimum(uniform * total, total * BELOW_ONE)
    start = tl.full([], 0, tl.int32)
    below = tl.full([], 0.0, tl.float64)
    mass = tl.sum(_tile(row_ptr, start, vocab_size, largest, scale, LANES), axis=0)
    while (below + mass <= target) & (start + LANES < vocab_size):  # the last tile takes what rounding leaves over
        below += mass
        start += LANES
        mass = tl.sum(_tile(row_ptr, start, vocab_size, largest, scale, LANES), axis=0)
    weights = _tile(row_ptr, start, vocab_size, largest, scale, LANES)
    lanes = tl.arange(0, LANES)
    is_beyond = (tl.cumsum(weights, axis=0) > target - below) & (weights > 0.0)
    lane = tl.min(tl.where(is_beyond, lanes, LANES), axis=0)
    last = tl.max(tl.where(weights > 0.0, lanes, 0), axis=0)  # a scan may round below the sum
    return start + tl.minimum(lane, last)


@triton.jit
def draw_kernel(
    logits_ptr,  # [num_reqs, vocab_size]
    temperature_ptr,  # [num_reqs] fp64
    top_k_ptr,  # [num_reqs] int32
    top_p_ptr,  # [num_reqs] fp64
    min_p_ptr,  # [num_reqs] fp64
    uniform_ptr,  # [num_reqs] fp64
    keys_ptr,  # [num_reqs, max_keys] int64
    num_keys_ptr,  # [num_reqs] int32
    largest_ptr,  # [num_reqs]
    total_ptr,  # [num_reqs] fp64
    token_ids_ptr,  # [num_reqs] int64
    num_kept_ptr,  # [num_reqs] int64
    logits_stride,  # between rows
    max_keys,
    vocab_size,
    LANES: tl.constexpr,
    KEYS: tl.constexpr,  # looked at together, of a row's keys
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    num_keys = tl.load(num_keys_ptr + row)
    if num_keys < 0:
        tl.store(token_ids_ptr + row, tl.full([], -1, tl.int64))
        tl.store(num_kept_ptr + row, tl.full([], 0, tl.int64))
        return
    temperature, top_k, top_p, min_p = _settings(row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size)
    scale = (1.4426950408889634 / temperature).to(tl.float32)  # weights are powers of 2
    largest = tl.load(largest_ptr + row)
    uniform = tl.load(uniform_ptr + row)
    if num_keys == 0:
        row_ptr = logits_ptr + row * logits_stride
        token = _draw_by_id(row_ptr, vocab_size, uniform, largest, scale, LANES)
        tl.store(token_ids_ptr + row, token.to(tl.int64))
        tl.store(num_kept_ptr + row, tl.cast(vocab_size, tl.int64))  # a number that is 1 is no tensor
        return

    keys = keys_ptr + row * max_keys
    low, high = _ends(keys, num_keys, KEYS)
    if (top_k > 0) & (top_k < num_keys):
        low = _search(keys, num_keys, low, high, top_k.to(tl.float64), largest, scale, True, False, KEYS)
        low = (low >> ID_BITS) << ID_BITS  # and all that equal the k-th
    if top_p < 1.0:
        mass = tl.load(total_ptr + row)
        if (top_k > 0) | (min_p > 0.0):
            mass = _weigh(keys, num_keys, low, largest, scale, False, KEYS)
        low = _search(keys, num_keys, low, high, top_p * mass, largest, scale, False, False, KEYS)
    tl.store(num_kept_ptr + row, _weigh(keys, num_keys, low, largest, scale, True, KEYS).to(tl.int64))
    mass = _weigh(keys, num_keys, low, largest, scale, False, KEYS)
    target = tl.minimum(uniform * mass, mass * BELOW_ONE)
    drawn = _search(keys, num_keys, low, high, target, largest, scale, False, True, KEYS)
    tl.store(token_ids_ptr + row, (drawn & ID_MASK) ^ ID_MASK)


def sample(
    logits: torch.Tensor,  # [num_reqs, vocab_size] fp32
    temperature: torch.Tensor,  # [num_reqs] float64
    top_k: torch.Tensor,  # [num_reqs] int32
    top_p: torch.Tensor,  # [num_reqs] float64
    min_p: torch.Tensor,  # [num_reqs] float64
    uniform: torch.Tensor,  # [num_reqs] float64
) -> tuple[torch.Tensor, torch.Tensor]:  # token ids and how many were kept, both [num_reqs] int64
    """See the package's docstring. Raises ValueError for a vocabulary whose ids do not fit into a key."""
    num_reqs, vocab_size = logits.shape
    if vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(f"logits: expected at most {MAX_VOCAB_SIZE} tokens, got {vocab_size}")
    max_keys = triton.cdiv(vocab_size, LANES) * LANES
    settings = [values.contiguous() for values in (temperature, top_k, top_p, min_p)]
    keys, token_ids, num_kept = (
        torch.empty(num_reqs, size, dtype=torch.int64, device=logits.device) for size in (max_keys, 1, 1)
    )
    found = [
        torch.empty(num_reqs, dtype=dtype, device=logits.device)
        for dtype in (torch.int32, torch.float32, torch.float64)
    ]
    sizes = (logits.stride(0), max_keys, vocab_size)
    if num_reqs:
        candidates_kernel[(num_reqs,)](
            logits, *settings, keys, *found, *sizes, LANES=LANES, num_warps=NUM_THREADS // warp_size(logits)
        )
        draw_kernel[(num_reqs,)](
            logits,
            *settings,
            uniform.contiguous(),
            keys,
            *found,
            token_ids,
            num_kept,
            *sizes,
            LANES=LANES,
            KEYS=KEYS,
            num_warps=DRAW_THREADS // warp_size(logits),
        )
    return token_ids[:, 0], num_kept[:, 0]


def builds() -> list[Build]:
    """64 rows of Qwen2.5's vocabulary; 1,000 candidates a row."""
    rows, vocab_size, num_keys = 64, 151936, 1000
    settings = {"temperature_ptr": "*fp64", "top_k_ptr": "*i32", "top_p_ptr": "*fp64", "min_p_ptr": "*fp64"}
    found = {"keys_ptr": "*i64", "num_keys_ptr": "*i32", "largest_ptr": "*fp32", "total_ptr": "*fp64"}
    inputs = {"logits_ptr": "*fp32", **settings, **found}
    outputs = {"uniform_ptr": "*fp64", "token_ids_ptr": "*i64", "num_kept_ptr": "*i64"}
    sizes = dict.fromkeys(("logits_stride", "max_keys", "vocab_size"), "i32")
    return [
        Build(
            operation="top_k_top_p",
            name=name,
            kernel=kernel,
            types={**types, **sizes},
            constants={"LANES": LANES} if kernel is candidates_kernel else {"LANES": LANES, "KEYS": KEYS},
            divisible=frozenset({*types, *sizes}),
            num_threads=NUM_THREADS if kernel is candidates_kernel else DRAW_THREADS,
            workload=workload,
        )
        for name, kernel, types, workload in (
            (
                "candidates",
                candidates_kernel,
                inputs,
                Workload(
                    f"{rows} rows of {vocab_size}",
                    rows * (4 * vocab_size + 8 * num_keys),
                    rows * vocab_size * 12,
                    rows,
                    4 * LANES,
                ),
            ),
            (
                "draw",
                draw_kernel,
                {**inputs, **outputs},
                Workload(f"{rows} rows of {num_keys} keys", rows * 8 * num_keys, 0, rows, 8 * num_keys),
            ),
        )
    ]
