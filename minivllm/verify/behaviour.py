"""What a client sees of the model, against transformers: tokens, text, next-token distributions, greedy runs, draws.

A greedy choice is a tie where transformers' two best log-probabilities are closer than TIE_GAP: rounding decides, and
what follows is another text. A run is compared up to its first difference, with the two best of both sides shown.

Knows no layers. Called by verify.py. Twin in vLLM: check_logprobs_close in tests/models/utils.py (which allows any
token among the other's best).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.generation import logits_process as hf

from minivllm.engine.llm_engine import LLMEngine
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import MiniVLLMError
from minivllm.hub import ModelSource
from minivllm.sample.metadata import SamplingMetadata, SamplingRow
from minivllm.sample.sampler import final_probabilities, sample
from minivllm.sampling_params import SamplingParams
from minivllm.verify.engines import generate
from minivllm.verify.observe import Observer
from minivllm.verify.records import FAIL, NOT_RUN, OK, TIE, Check
from minivllm.verify.reference import Reference

TIE_GAP = 1e-4  # nats
LOGPROB_TOLERANCE = 1e-4  # nats, in float32, whatever the order of the sums
NUM_LIKELY = 5  # tokens of a position, as the golden data has them
BEST_TOLERANCE = 5e-4  # of the best 20: behind a sure token they are e**-20 likely; Qwen2.5-0.5B has 1.0e-4 there
KL_TOLERANCE = 1e-7  # nats; two float32 networks differ by the square of LOGPROB_TOLERANCE, and by the sum's rounding
PROBABILITY_TOLERANCE = (
    1e-5  # half the sum of all differences; ours is float64, transformers' scores are float32 at best
)
CHI_SQUARE_DEVIATIONS = 4.0
NUM_DRAWS = 400
TEXTS = (
    "Hello",
    "The capital of France is",
    "Die Straße nach Köln führt über 1.024 Brücken 🙂",
    "def add(first, second):\n    return",
    "  two  spaces\n\n\tand a tab, 3.14159",
    "東京は日本の首都です。",
)
CHAT: Sequence[Sequence[dict[str, str]]] = (
    [{"role": "user", "content": "What is a block?"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Why?"}],
)
SAMPLING: Sequence[dict[str, Any]] = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.8},
    {"temperature": 1.0, "repetition_penalty": 1.3, "top_k": 50},
)


def verdict(passed: bool) -> str:
    return OK if passed else FAIL


# ------------------------------------------------------------------ text
def check_tokenizer(engine: LLMEngine, source: ModelSource) -> list[Check]:
    """Ids of texts and conversations, and the way back. A GGUF's tokenizer has no second reader that can be trusted:
    transformers takes one pre-tokenizer for another (engine/tokenizer.py)."""
    section, tokenizer = "tokenizer", engine.tokenizer
    if tokenizer is None:
        return [Check(section, "ids of texts", NOT_RUN, detail="the model has no tokenizer")]
    back = [text for text in TEXTS if _round_trip(tokenizer, text) != text]
    checks = []
    if tokenizer.is_byte_level:
        checks.append(Check(section, "text -> ids -> text", verdict(not back), f"{len(back)} of {len(TEXTS)}", "0"))
    if source.kind == "gguf":
        reason = "a .gguf file: transformers' tokenizer for it is not the truth"
        names = ("ids of texts", "chat template")
        return checks + [Check(section, name, NOT_RUN, detail=reason) for name in names]
    truth: Any = AutoTokenizer.from_pretrained(source.path)
    wrong = [text for text in TEXTS if truth(text)["input_ids"] != tokenizer.encode(text)]
    detail = repr(wrong[0]) if wrong else ""
    checks.append(Check(section, "ids of texts", verdict(not wrong), f"{len(wrong)} of {len(TEXTS)}", "0", detail))
    if truth.chat_template is None:
        return [*checks, Check(section, "chat template", NOT_RUN, detail="the model has none")]
    wrong_chats = [chat for chat in CHAT if _their_chat(truth, chat) != _our_chat(engine, chat)]
    detail = str(wrong_chats[:1]) if wrong_chats else ""
    return [*checks, Check(section, "chat template", verdict(not wrong_chats), f"{len(wrong_chats)} of 2", "0", detail)]


def _round_trip(tokenizer: Any, text: str) -> str:
    return str(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False))


def _their_chat(truth: Any, chat: Sequence[dict[str, str]]) -> Any:
    """Ids, or None where the template refuses."""
    try:
        return list(truth.apply_chat_template(list(chat), add_generation_prompt=True, return_dict=False))
    except Exception:  # whatever a template raises
        return None


def _our_chat(engine: LLMEngine, chat: Sequence[dict[str, str]]) -> Any:
    """Ids, or None where the template refuses."""
    try:
        return engine.tokenize_prompt(engine.render_chat(list(chat)))[0]
    except MiniVLLMError:
        return None


def prompts_of(tokenizer: Tokenizer | None, vocab_size: int, room: int) -> list[list[int]]:
    """One token, ids of no meaning around the block size, texts, a conversation; `room` tokens at most."""
    prompts = [[vocab_size // 2], [(7 * i * i + 31 * i + 5) % (vocab_size - 4) + 4 for i in range(33)]]
    if tokenizer is not None:
        prompts += [ids for ids in map(tokenizer.encode, TEXTS) if ids]
        if tokenizer.chat_template:
            prompts.append(chat_ids(tokenizer, CHAT[0]))
    return [prompt[:room] for prompt in prompts if max(prompt) < vocab_size]


def chat_ids(tokenizer: Tokenizer, chat: Sequence[dict[str, str]]) -> list[int]:
    """A conversation through the model's template."""
    return tokenizer.encode(tokenizer.apply_chat_template(chat), add_special_tokens=False)


# ------------------------------------------------------------------ distributions
def check_answers(
    engine: LLMEngine, reference: Reference, prompts: list[list[int]], max_tokens: int
) -> tuple[list[Check], list[tuple[float, float]]]:
    """Each prompt alone, and what it goes on to: next tokens everywhere, and the greedy run. With it the pairs
    (transformers' log-probability, ours) of all prompt tokens, as a batch gives them."""
    agreeing = positions = 0
    largest_kl = largest_delta = largest_of_few = 0.0
    runs: list[tuple[str, str]] = []
    with Observer(engine) as observer:
        for prompt in prompts:
            ours = observer.run(prompt, max_tokens)
            found = torch.log_softmax(ours.values["logits"].double(), dim=-1)  # [rows, vocab_size]
            expected = torch.log_softmax(reference.logits(ours.token_ids).double(), dim=-1)
            runs.append(compare_run(prompt, ours.output_ids, expected, _first_two(found, len(prompt) - 1)))
            best = expected.topk(2)
            expected = expected[ours.first_row :]
            clear = best.values[ours.first_row :].diff().abs().flatten() > TIE_GAP
            agreeing += int((found.argmax(1) == expected.argmax(1))[clear].sum())
            positions += int(clear.sum())
            largest_kl = max(
                largest_kl, float((expected.exp() * (expected - found)).sum(1).abs().nan_to_num(torch.inf).max())
            )
            top = expected.topk(min(20, expected.shape[1])).indices
            delta = (expected.gather(1, top) - found.gather(1, top)).abs().nan_to_num(torch.inf)
            largest_delta = max(largest_delta, float(delta.max()))
            largest_of_few = max(largest_of_few, float(delta[:, :NUM_LIKELY].max()))
    section = "next token"
    checks = [
        Check(section, "top-1 agreement", verdict(agreeing == positions), f"{agreeing} of {positions}", "all but ties"),
        Check(section, "KL divergence", verdict(largest_kl <= KL_TOLERANCE),
              f"{largest_kl:.1e}", f"{KL_TOLERANCE:.0e}"),
        Check(section, f"log-probabilities of the best {NUM_LIKELY}", verdict(largest_of_few <= LOGPROB_TOLERANCE),
              f"{largest_of_few:.1e}", f"{LOGPROB_TOLERANCE:.0e}"),
        Check(section, "log-probabilities of the best 20", verdict(largest_delta <= BEST_TOLERANCE),
              f"{largest_delta:.1e}", f"{BEST_TOLERANCE:.0e}"),
    ]  # fmt: skip
    for index, (status, words) in enumerate(runs):
        value, _, detail = words.partition(", then ")
        name = f"prompt {index} ({len(prompts[index])} tokens)"
        checks.append(Check("greedy", name, status, value, f"{max_tokens} equal tokens", detail))
    logprob_check, pairs = check_prompt_logprobs(engine, reference, prompts)
    return [*checks, *logprob_check, _check_text(engine, prompts, max_tokens)], pairs


def _first_two(logprobs: torch.Tensor, first: int) -> list[str]:
    """The two best of every row from `first` on, in words. logprobs: [rows, vocab_size]"""
    best = logprobs[first:].topk(2)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [f"{ids[0]} ({v[0]:.5f}), {ids[1]} ({v[1]:.5f})" for ids, v in pairs]


def compare_run(prompt: list[int], output_ids: list[int], expected: torch.Tensor, found: list[str]) -> tuple[str, str]:
    """(status, words) of a greedy run. expected: [num_tokens, vocab_size] log-probabilities of prompt and output, of
    which the last token may be missing; found: our two best at every output position."""
    for index, token_id in enumerate(output_ids):
        row = expected[len(prompt) - 1 + index]
        best = row.topk(2)
        if token_id != int(best.indices[0]):
            gap = float(best.values[0] - row[token_id])
            ours = found[index] if index < len(found) else str(token_id)
            words = f"token {index}: transformers {_first_two(row[None], 0)[0]}; here {ours}"
            if gap <= TIE_GAP:
                return TIE, f"{index} equal tokens, then a tie (gap {gap:.1e}): {words}"
            return FAIL, f"{index} equal tokens, then another one that transformers puts {gap:.3g} nats behind: {words}"
    return OK, f"{len(output_ids)} equal tokens"


def check_prompt_logprobs(
    engine: LLMEngine, reference: Reference, prompts: list[list[int]]
) -> tuple[list[Check], list[tuple[float, float]]]:
    """As a client asks for them, all prompts in one batch."""
    outputs = generate(engine, prompts, max_tokens=1, prompt_logprobs=1)
    pairs: list[tuple[float, float]] = []
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = torch.log_softmax(reference.logits(prompt).double(), dim=-1)
        for position in range(1, len(prompt)):
            entry = (output.prompt_logprobs or [])[position]
            ours = entry[prompt[position]].logprob if entry else math.nan
            pairs.append((float(expected[position - 1, prompt[position]]), ours))
    delta = max((abs(a - b) if math.isfinite(b) else math.inf for a, b in pairs), default=0.0)
    check = Check("prompt logprobs", f"{len(pairs)} tokens", verdict(delta <= LOGPROB_TOLERANCE), f"{delta:.1e}",
                  f"{LOGPROB_TOLERANCE:.0e}")  # fmt: skip
    return [check], pairs


def _check_text(engine: LLMEngine, prompts: list[list[int]], max_tokens: int) -> Check:
    """The text that was put together token by token continues the prompt's: it is the end of all ids' text at once."""
    if engine.tokenizer is None:
        return Check("tokenizer", "text of answers", NOT_RUN, detail="the model has no tokenizer")
    wrong = []
    for prompt, output in zip(prompts, generate(engine, prompts, max_tokens=max_tokens), strict=True):
        text, whole = output.outputs[0].text, engine.decode([*prompt, *output.outputs[0].token_ids])
        if not (whole.endswith(text) and len(whole) - len(text) <= len(engine.decode(prompt))):
            wrong.append(text)
    detail = str(wrong[0]) if wrong else ""
    return Check("tokenizer", "text of answers", verdict(not wrong), f"{len(wrong)} of {len(prompts)}", "0", detail)


# ------------------------------------------------------------------ sampler
def check_sampler(reference: Reference, prompt: list[int]) -> list[Check]:
    """What can be drawn, and how often, behind one prompt: ours against transformers' processors."""
    logits = reference.logits(prompt)[-1]
    checks = []
    for settings in SAMPLING:
        params = SamplingParams(**settings, seed=0)
        expected, margin = _distribution(logits, settings, prompt)
        found = final_probabilities(logits[None].clone(), _rows(params, [0], len(logits), prompt))[0]
        distance = 0.5 * float((found - expected).abs().sum())
        status = verdict(distance <= PROBABILITY_TOLERANCE)
        if status == FAIL and margin <= PROBABILITY_TOLERANCE:
            status = TIE
        name = ", ".join(f"{key} {value}" for key, value in settings.items())
        checks.append(Check("sampler", name, status, f"distance {distance:.1e}", f"{PROBABILITY_TOLERANCE:.0e}",
                            f"{int((found > 0).sum())} tokens can be drawn"))  # fmt: skip
    return [*checks, _check_draws(logits, prompt)]


def _rows(params: SamplingParams, seeds: list[int], vocab_size: int, prompt: list[int]) -> SamplingMetadata:
    return SamplingMetadata.from_requests(
        [SamplingRow(params, seed=seed, vocab_size=vocab_size, prompt_token_ids=prompt) for seed in seeds]
    )


def _distribution(
    logits: torch.Tensor,  # [vocab_size]
    settings: dict[str, Any],
    prompt: list[int],
) -> tuple[torch.Tensor, float]:
    """(probabilities [vocab_size] after transformers' processors, how near a token is to the edge of what is kept)."""
    ids: Any = torch.tensor([prompt])
    scores: Any = logits[None].clone()
    margin = 1.0
    if "repetition_penalty" in settings:
        scores = hf.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"])(ids, scores)
    scores = scores.double() / settings["temperature"]
    if "min_p" in settings:
        weights = scores.softmax(-1)
        margin = min(margin, float((weights / weights.max() - settings["min_p"]).abs().min()))
        scores = hf.MinPLogitsWarper(settings["min_p"])(ids, scores)
    if "top_k" in settings:
        scores = hf.TopKLogitsWarper(settings["top_k"])(ids, scores)
    if "top_p" in settings:
        mass = scores.softmax(-1).sort(descending=True).values.cumsum(-1)
        margin = min(margin, float((mass - settings["top_p"]).abs().min()))
        scores = hf.TopPLogitsWarper(settings["top_p"])(ids, scores)
    return scores.softmax(-1)[0], margin


def _check_draws(logits: torch.Tensor, prompt: list[int]) -> Check:  # [vocab_size]
    """Seeded draws against the distribution: chi-square, as normal deviations (Wilson and Hilferty)."""
    settings: dict[str, Any] = {"temperature": 1.0, "top_k": 20}
    expected, _ = _distribution(logits, settings, prompt)
    counts = torch.zeros(len(expected), dtype=torch.double)
    for start in range(0, NUM_DRAWS, 50):
        metadata = _rows(SamplingParams(**settings), list(range(start, start + 50)), len(logits), prompt)
        drawn = sample(logits.expand(50, -1).clone(), metadata).sampled_token_ids
        counts += torch.bincount(torch.tensor(drawn), minlength=len(expected))
    common = expected * NUM_DRAWS >= 5
    cells = [(float(counts[common][i]), float(expected[common][i]) * NUM_DRAWS) for i in range(int(common.sum()))]
    cells.append((float(counts[~common].sum()), float(expected[~common].sum()) * NUM_DRAWS))
    cells = [cell for cell in cells if cell[1] > 0]
    freedom = max(1, len(cells) - 1)
    chi = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    deviations = ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    forbidden = int(counts[expected == 0].sum())
    passed = deviations <= CHI_SQUARE_DEVIATIONS and forbidden == 0
    detail = f"chi-square {chi:.1f} of {len(cells)} cells; {forbidden} forbidden"
    limit = f"{CHI_SQUARE_DEVIATIONS:.0f}"
    return Check("sampler", f"{NUM_DRAWS} draws", verdict(passed), f"{deviations:.1f} deviations", limit, detail)
