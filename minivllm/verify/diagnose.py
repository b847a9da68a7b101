"""What a fault looks like: hypotheses, each computed from transformers' own values and compared with ours.

    an output of a product     another shard, a bias, a scale: the two weights side by side
    a norm                     a missing residual, another epsilon (solved for), another weight
    keys in the cache          other slots, another block's tokens, rotated by other angles or in other pairs
    attention's output         another scale, window, grouping of heads, mask: attention is computed under each
    the MLP's product          gate and up exchanged, another activation
    a layer's output           a sum that was left out

A hypothesis is believed when it explains all but a twentieth of the difference. What none explains is `unknown`.
Called by localise.py. Twin in vLLM: none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from minivllm.verify.observe import Observer, Trace
from minivllm.verify.reference import Reference, ReferenceTrace

EXPLAINED = 0.05  # of the difference may be left
Guess = tuple[str, str]  # kind, evidence
UNKNOWN: Guess = ("unknown", "No hypothesis explains the difference.")


@dataclass(frozen=True)
class Place:
    """A point that is wrong, and everything that is known about the request."""

    point: str
    layer: int | None
    observer: Observer
    ours: Trace
    forced: ReferenceTrace
    reference: Reference

    @property
    def parent(self) -> str:
        return self.point.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.point.rpartition(".")[2]

    def found(self, point: str | None = None) -> torch.Tensor:  # [rows, width]
        """Ours: the rows that this request computed, or of keys and values all."""
        found = self.ours.get(point or self.point)
        if found is None:
            raise KeyError(point or self.point)
        return found

    def expected(self, point: str | None = None) -> torch.Tensor:  # [rows, width]
        """transformers', the same rows as `found`."""
        expected = self.forced.values[point or self.point]
        return expected[len(expected) - len(self.found()) :]

    def explains(self, candidate: torch.Tensor) -> bool:
        """Whether a candidate is what ours is. candidate: [rows, width], as expected."""
        found, expected = self.found(), self.expected()
        rows = torch.isfinite(found).all(dim=1)
        if candidate.shape != found.shape or not rows.any():
            return False
        left = (found - candidate)[rows].norm()
        return bool(left <= EXPLAINED * (found - expected)[rows].norm())


def diagnose(place: Place) -> Guess:
    """The kind of the fault and the evidence for it."""
    for hypotheses in _hypotheses_for(place):
        guess = hypotheses(place)
        if guess is not None:
            return guess
    if not torch.isfinite(place.found()).all():
        return "unwritten memory", "There are NaN where nobody wrote: a slot is read that this request does not own."
    return UNKNOWN


def _hypotheses_for(place: Place) -> Iterator[Callable[[Place], Guess | None]]:
    if place.name in ("key", "value"):
        yield from (_slots, _stale_prefix, _rotation)
    elif place.name == "context":
        yield _attention
    elif place.name == "activation":
        yield _activation
    elif place.name.endswith(("_proj", "c_attn", "dense")):
        yield from (_shard, _product)
    elif "norm" in place.name or place.name == "ln_f":
        yield from (_residual_before_norm, _epsilon)
    elif place.layer is not None and place.name == str(place.layer):
        yield _residual_of_layer
    yield _scale


# ------------------------------------------------------------------ products
def _shard(place: Place) -> Guess | None:
    """Another product of the same input."""
    for point in place.forced.values:
        is_sibling = point.startswith(f"{place.parent}.") and point.endswith("_proj") and point != place.point
        if is_sibling and place.explains(place.expected(point)):
            first, second = sorted((point.rpartition(".")[2], place.name))
            return f"{first} and {second} swapped", f"What comes out is {point.rpartition('.')[2]} of the same input."
    return None


def _product(place: Place) -> Guess | None:
    """The weight and the bias that our product really uses, beside transformers'."""
    difference = place.found() - place.expected()
    found = place.observer.weight(place.point)
    module: Any = place.reference.network.base_model.get_submodule(place.point) if place.layer is not None else None
    bias = getattr(module, "bias", None)
    if bias is not None and place.explains(place.expected() - bias):
        return "dropped bias", "The output is transformers' without the bias."
    constant = difference.mean(dim=0).expand_as(difference)
    if place.explains(place.expected() + constant) and len(difference) > 1:
        return "wrong bias", f"Every position is off by the same vector, of length {float(constant[0].norm()):.3g}."
    if found is None or not hasattr(module, "weight"):
        return None
    return _weight_scale(found[0], module.weight)


def _weight_scale(found: torch.Tensor, expected: torch.Tensor) -> Guess | None:
    """found, expected: [out_features, in_features]. Which part of the weight is a multiple of what it should be?"""
    wrong = (found - expected).abs() > 0.25 * expected.abs().mean()
    if not wrong.any():
        return None
    rows, columns = wrong.any(dim=1).nonzero().flatten(), wrong.any(dim=0).nonzero().flatten()
    part = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
    ours, theirs = found[part].flatten(), expected[part].flatten()
    factor = float(ours @ theirs / (theirs @ theirs))
    where = f"rows {part[0].start}-{part[0].stop - 1}, columns {part[1].start}-{part[1].stop - 1}"
    if float((ours - factor * theirs).norm()) <= 0.2 * float(ours.norm()):  # what codes of 4 bits leave
        return "wrong scale of the weight", f"The weight is {factor:.3g} times transformers' in {where}."
    return "other weights", f"{float(wrong.float().mean()):.1%} of the weight differ, in {where}."


def _scale(place: Place) -> Guess | None:
    """All of it times one number."""
    found, expected = place.found(), place.expected()
    rows = torch.isfinite(found).all(dim=1)
    factor = float((found[rows] * expected[rows]).sum() / expected[rows].square().sum().clamp(min=1e-20))
    if place.explains(factor * expected):
        return "wrong scale", f"Everything is {factor:.4g} times what it should be."
    return None


# ------------------------------------------------------------------ norms and sums
def _residual_before_norm(place: Place) -> Guess | None:
    """The norm of the attention's output alone, or of the layer's input alone."""
    layer = f"{place.ours.layers_path}.{place.layer}"
    attention = next((p for p in (f"{layer}.self_attn", f"{layer}.attn") if p in place.forced.values), None)
    if place.layer is None or attention is None or place.name == "input_layernorm":
        return None
    norm: Any = place.reference.network.base_model.get_submodule(place.point)
    if place.explains(norm(place.expected(attention))):
        return "missing residual", "The norm is that of the attention's output without the layer's input."
    if place.explains(norm(place.expected(f"{layer}.input"))):
        return "missing residual", "The norm is that of the layer's input: the attention's output was not added."
    return None


def _epsilon(place: Place) -> Guess | None:
    """A factor for every row, the larger the smaller the row: solve for the epsilon; or one for every column."""
    norm: Any = place.reference.network.base_model.get_submodule(place.point)
    found, expected = place.found(), place.expected()
    by_row = (found * expected).sum(dim=1) / expected.square().sum(dim=1)  # [rows]
    if place.explains(by_row[:, None] * expected):
        epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))
        squares = _mean_squares(place, norm)
        ours = float(((squares + epsilon) / by_row.square() - squares).median()) if squares is not None else math.nan
        return "wrong norm epsilon", f"Rows are off by a factor each: as if epsilon was {ours:.1e}, not {epsilon:.1e}."
    by_column = (found * expected).sum(dim=0) / expected.square().sum(dim=0).clamp(min=1e-20)  # [width]
    if place.explains(by_column * expected):
        return (
            "wrong norm weight",
            f"Columns are off by a factor each, from {by_column.min():.3g} to {by_column.max():.3g}.",
        )
    return None


def _mean_squares(place: Place, norm: Any) -> torch.Tensor | None:  # [rows]
    """Of what goes into a norm, where it is on record: the layer's input."""
    point = f"{place.ours.layers_path}.{place.layer}.input"
    if place.name != "input_layernorm":
        return None
    return place.found(point).square().mean(dim=1)


def _residual_of_layer(place: Place) -> Guess | None:
    """The layer's output is input + attention + MLP; which is not in it?"""
    expected = place.expected
    parts = {"the layer's input": expected(f"{place.point}.input")}
    for name, points in (
        ("the attention's output", ("self_attn", "attn", "attention")),
        ("the MLP's output", ("post_feedforward_layernorm", "mlp")),
    ):
        point = next((p for p in points if f"{place.point}.{p}" in place.forced.values), None)
        if point is not None:
            parts[name] = expected(f"{place.point}.{point}")
    for name, part in parts.items():
        if place.explains(expected() - part):
            return "missing residual", f"The sum is without {name}."
    return None


# ------------------------------------------------------------------ the cache
def _slots(place: Place) -> Guess | None:
    """The right vectors at other positions."""
    found, expected = place.found(), place.forced.values[place.point]
    for shift in (1, -1, 2, -2):
        moved = found.roll(-shift, dims=0)
        edge = slice(0, -shift) if shift > 0 else slice(-shift, None)
        same = (moved - expected)[edge].norm(dim=1) <= EXPLAINED * expected[edge].norm(dim=1)
        if float(same.float().mean()) > 0.5:  # where blocks do not lie side by side, the vector is somewhere else
            return "off-by-one slot", f"The vector of position p lies in the slot of p {shift:+d}."
    return None


def _stale_prefix(place: Place) -> Guess | None:
    """Wrong only where another request computed it."""
    found, expected, cached = place.found(), place.forced.values[place.point], place.ours.first_row
    wrong = ~((found - expected).norm(dim=1) <= EXPLAINED * expected.norm(dim=1))
    if cached and wrong[:cached].any() and not wrong[cached:].any():
        size = place.observer.engine.plan.block_size
        blocks = sorted({int(position) // size for position in wrong.nonzero().flatten()})
        return (
            "stale prefix block",
            f"Blocks {blocks} of the request came out of the prefix cache with other tokens' vectors.",
        )
    return None


def _rotation(place: Place) -> Guess | None:
    """The key before rotation is right, so what is left is the angle, or which two numbers are turned together."""
    query, key, value, scale = place.forced.attention[place.parent]
    num_heads, num_rows, size = key.shape
    before = place.forced.values.get(f"{place.parent}.k_norm", place.forced.values.get(f"{place.parent}.k_proj"))
    if place.name != "key" or before is None or before.shape != place.found().shape:
        return None
    raw, found = (x.reshape(num_rows, num_heads, size) for x in (before, place.found()))
    rows = torch.isfinite(found).flatten(1).all(dim=1)
    right = key.transpose(0, 1)
    raw = raw * (right.norm() / raw.norm())  # YaRN makes keys longer
    if _same(_pair_lengths(found, "halves")[rows], _pair_lengths(raw, "halves")[rows]):
        wrong_at = (found - right).flatten(1).norm(dim=1) > EXPLAINED * right.flatten(1).norm(dim=1)
        first = f"from position {int(wrong_at.nonzero()[0])} on" if wrong_at.any() else "a little everywhere"
        return (
            "wrong rotary angle",
            f"Pairs keep their lengths but are turned otherwise, {first}: rope theta, scaling or positions.",
        )
    if _same(_pair_lengths(found, "neighbours")[rows], _pair_lengths(raw, "neighbours")[rows]):
        return "wrong rotary pairing", "Neighbours (2i, 2i + 1) are turned together, not (i, i + half)."
    if _same(found.norm(dim=2)[rows], raw.norm(dim=2)[rows]):
        return "wrong rotary pairing", "Heads keep their lengths, pairs do not: other numbers are turned together."
    return None


def _pair_lengths(heads: torch.Tensor, pairing: str) -> torch.Tensor:
    """heads: [rows, num_heads, head_size] -> [rows, num_heads, head_size / 2]"""
    half = heads.shape[-1] // 2
    shape = (2, half) if pairing == "halves" else (half, 2)
    return heads.unflatten(-1, shape).norm(dim=-2 if pairing == "halves" else -1)


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """found, expected: any shape, the same."""
    return bool((found - expected).norm() <= 1e-3 * expected.norm())


# ------------------------------------------------------------------ attention
def _attention(place: Place) -> Guess | None:
    """Attention of transformers' own query, keys and values under other settings."""
    query, key, value, scale = place.forced.attention[place.parent]
    module: Any = place.reference.network.base_model.get_submodule(place.parent)
    window = getattr(module, "sliding_window", None)
    num_rows = query.shape[1]
    rows = len(place.found())

    def attend(**changed: Any) -> torch.Tensor:  # [rows, num_heads * head_size]
        settings: dict[str, Any] = {"scale": scale, "window": window, "grouping": "blocks", "ahead": 0} | changed
        return _attend(query, key, value, **settings)[-rows:]

    for other in (None, *(w for w in range(1, num_rows + 1) if w != window)):
        if (other is not None or window is not None) and place.explains(attend(window=other)):
            said = "no window" if other is None else f"a window of {other} tokens"
            return "wrong sliding window", f"As with {said}; the configuration says {window}."
    if len(key) not in (1, len(query)) and place.explains(attend(grouping="interleaved")):
        return "wrong head grouping", f"Query head h reads key head h % {len(key)}, not h // {len(query) // len(key)}."
    if len(key) > 1 and place.explains(attend(grouping="reversed")):
        return "wrong head grouping", "Query heads read the key heads in the opposite order."
    for ahead, said in ((num_rows, "Every position sees all later ones."), (1, "Every position sees the next one."),
                        (-1, "Every position misses itself.")):  # fmt: skip
        if place.explains(attend(ahead=ahead)):
            return "wrong causal mask", said
    return _attention_scale(place, scale, lambda factor: attend(scale=scale * factor))


def _attention_scale(place: Place, scale: float, attend: Callable[[float], torch.Tensor]) -> Guess | None:
    """The factor of the scores that comes closest, by trying."""
    found = place.found()
    low, high = -6.0, 6.0  # log2
    best = 0.0
    for _ in range(6):
        steps = [low + (high - low) * i / 12 for i in range(13)]
        best = min(steps, key=lambda step: float((found - attend(2.0**step)).nan_to_num(1e9).norm()))
        low, high = best - (high - low) / 12, best + (high - low) / 12
    if not place.explains(attend(2.0**best)):
        return None
    return "wrong attention scale", f"As with a scale of {scale * 2.0**best:.4g}; {scale:.4g} is right."


def _attend(
    query: torch.Tensor,  # [num_heads, num_tokens, head_size]
    key: torch.Tensor,  # [num_kv_heads, num_tokens, head_size]
    value: torch.Tensor,  # [num_kv_heads, num_tokens, head_size]
    scale: float,
    window: int | None,
    grouping: str,
    ahead: int,
) -> torch.Tensor:  # [num_tokens, num_heads * head_size]
    """Plain causal attention; position i sees (i + ahead - window, i + ahead]."""
    num_heads, num_tokens, _ = query.shape
    head = torch.arange(num_heads)
    group = num_heads // len(key)
    reads = {"blocks": head // group, "interleaved": head % len(key), "reversed": len(key) - 1 - head // group}[
        grouping
    ]
    scores = query.double() @ key[reads].double().transpose(1, 2) * scale
    rows, columns = torch.arange(num_tokens)[:, None] + ahead, torch.arange(num_tokens)[None]
    hidden = columns > rows
    if window is not None:
        hidden = hidden | (columns <= rows - window)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
    return (weights @ value[reads].double()).transpose(0, 1).flatten(1).float()


# ------------------------------------------------------------------ the MLP
def _activation(place: Place) -> Guess | None:
    """activation(gate) * up, in other ways."""
    gate, up = (place.expected(f"{place.parent}.{name}") for name in ("gate_proj", "up_proj"))
    module: Any = place.reference.network.base_model.get_submodule(place.parent)
    if place.explains(module.act_fn(up) * gate):
        return "gate and up swapped", "The activation is applied to up_proj's output."
    others: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": F.silu, "gelu": F.gelu, "gelu (tanh)": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu,
        "none": lambda x: x,
    }  # fmt: skip
    for name, function in others.items():
        if place.explains(function(gate) * up):
            return "wrong activation", f"As with the activation {name}."
    return None
