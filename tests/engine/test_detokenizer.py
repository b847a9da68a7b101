"""The incremental detokenizer against decode() of everything at once (C2).

MINIVLLM_CASES is the number of random sequences per kind of tokenizer in the large test; a fourth of it goes to
hypothesis, which finds the smallest failing case. The ordinary run has 3,000 in all.
"""

import os
import random
from functools import lru_cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minivllm.engine.detokenizer import IncrementalDetokenizer, _PieceText
from minivllm.engine.tokenizer import Tokenizer

from .tiny_tokenizers import KINDS, TEXT, tiny_tokenizer

CASES = int(os.environ.get("MINIVLLM_CASES", "400"))
CHARACTERS = "é你😀👩\u200d👧🏽 a\ufffd\ud7ff\ue000\U0010ffff"
BEYOND = 40  # ids past the tokenizer's length: the logits may be wider


# ---------------------------------------------------------------------- oracles
def expected_text(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool) -> str:
    """decode(prompt + output) behind the text that the prompt alone makes certain."""
    seen = visible(tokenizer, prompt, skip)
    if tokenizer.is_byte_level:
        data = b"".join(tokenizer.token_bytes(i) for i in seen)
        start = len(without_split_character(data).decode("utf-8", "replace"))
    else:
        run = b""
        for i in reversed(seen):
            byte = tokenizer.token_byte(i)
            if byte is None:
                break
            run = bytes([byte]) + run
        num_waiting = len(run) - len(without_split_character(run))
        start = len(whole_text(tokenizer, seen[: len(seen) - num_waiting], skip))
    return whole_text(tokenizer, prompt + output, skip)[start:]


def whole_text(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    """decode(), but with sentencepiece's rule for byte tokens: good characters of a bad run stay."""
    if not any(tokenizer.token_byte(i) is not None for i in ids):
        return tokenizer.decode(ids, skip_special_tokens=skip)
    pieces: list[str | bytes] = []
    for i in visible(tokenizer, ids, skip):
        byte = tokenizer.token_byte(i)
        if byte is None:
            pieces.append(tokenizer.convert_ids_to_tokens([i])[0].replace("▁", " "))
        elif pieces and isinstance(pieces[-1], bytes):
            pieces[-1] += bytes([byte])
        else:
            pieces.append(bytes([byte]))
    text = "".join(piece if isinstance(piece, str) else decode_run(piece) for piece in pieces)
    return text.removeprefix(" ")


def has_half_good_run(tokenizer: Tokenizer, ids: list[int], skip: bool) -> bool:
    """A run of byte tokens with characters and bad bytes: the one case where the Rust decoder says something else."""
    runs = [b""]
    for i in visible(tokenizer, ids, skip):
        byte = tokenizer.token_byte(i)
        runs = [*runs, b""] if byte is None else [*runs[:-1], runs[-1] + bytes([byte])]
    texts = [(run, decode_run(run)) for run in runs]
    return any(text.encode() != run and text != "\ufffd" * len(run) for run, text in texts)


def decode_run(data: bytes) -> str:
    text, at = "", 0
    while at < len(data):
        for length in (1, 2, 3, 4):
            try:
                text += data[at : at + length].decode("utf-8")
            except UnicodeDecodeError:
                continue
            at += length
            break
        else:
            text, at = text + "\ufffd", at + 1
    return text


def visible(tokenizer: Tokenizer, ids: list[int], skip: bool) -> list[int]:
    return [i for i in ids if tokenizer.has_token(i) and not (skip and i in tokenizer.all_special_ids)]


def without_split_character(data: bytes) -> bytes:
    """Without the start of a character that more bytes could complete."""
    for cut in range(1, min(4, len(data) + 1)):
        for rest in (b"\x80", b"\x80\x80", b"\x80\x80\x80", b"\xbf", b"\xbf\x80", b"\xbf\x80\x80", b"\x90\x80\x80"):
            try:
                (data[len(data) - cut :] + rest).decode("utf-8")
            except UnicodeDecodeError:
                continue
            if data[len(data) - cut] >= 0xC2:
                return data[: len(data) - cut]
    return data


def streamed(detokenizer: IncrementalDetokenizer, pieces: list[list[int]]) -> list[str]:
    return [*(detokenizer.append(piece) for piece in pieces), detokenizer.flush()]


# ---------------------------------------------------------------------- strategies
@lru_cache
def ids_by_byte(tokenizer: Tokenizer) -> dict[int, int]:
    """Byte -> the token that is just this byte."""
    found = {}
    for i in range(tokenizer.vocab_size):
        byte = tokenizer.token_byte(i)
        if tokenizer.is_byte_level and len(tokenizer.token_bytes(i)) == 1:
            byte = tokenizer.token_bytes(i)[0]
        if byte is not None:
            found[byte] = i
    return found


@lru_cache
def ids_of(kind: str, max_size: int = 12) -> st.SearchStrategy[list[int]]:
    """Random ids of the whole vocabulary and beyond, mixed with whole and broken characters and real text."""
    tokenizer = tiny_tokenizer(kind)
    any_id = st.integers(0, tokenizer.vocab_size + BEYOND).map(lambda i: [i])
    texts = st.sampled_from([tokenizer.encode(text, add_special_tokens=False)[:12] for text in TEXT])
    some = [any_id, any_id, texts]
    by_byte = ids_by_byte(tokenizer)
    if by_byte:
        spelled = [[by_byte[b] for b in c.encode()] for c in CHARACTERS]
        broken = [ids[:cut] for ids in spelled for cut in range(1, len(ids))]
        single = [[i] for i in by_byte.values()]
        some += [st.sampled_from(spelled), st.sampled_from(broken), st.sampled_from(single)]
    return st.lists(st.one_of(some), max_size=max_size).map(lambda parts: sum(parts, []))


@st.composite
def cases(draw, kind: str):
    prompt = draw(st.one_of(st.just([]), ids_of(kind, 4)))
    output = draw(ids_of(kind))
    cuts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    return prompt, output, cuts, draw(st.booleans())


def random_ids(rng: random.Random, kind: str, max_parts: int) -> list[int]:
    """The same mixture as ids_of, drawn faster."""
    tokenizer = tiny_tokenizer(kind)
    by_byte = ids_by_byte(tokenizer)
    ids: list[int] = []
    for _ in range(rng.randrange(max_parts + 1)):
        choice = rng.random()
        if choice < 0.3 or not by_byte:
            ids += rng.choices(range(tokenizer.vocab_size + BEYOND), k=rng.randrange(1, 4))
        elif choice < 0.4:
            ids += tokenizer.encode(rng.choice(TEXT), add_special_tokens=False)[: rng.randrange(12)]
        elif choice < 0.5:
            ids += [by_byte[b] for b in rng.choices(sorted(by_byte), k=rng.randrange(1, 4))]
        else:
            spelled = [by_byte[b] for b in rng.choice(CHARACTERS).encode()]
            ids += spelled[: rng.randrange(1, 5)] if choice < 0.65 else spelled
    return ids


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    pieces, at, turn = [], 0, 0
    while at < len(ids):
        pieces.append(ids[at : at + sizes[turn % len(sizes)]])
        at += len(pieces[-1])
        turn += 1
    return pieces


# ---------------------------------------------------------------------- claims
def check(kind: str, prompt: list[int], output: list[int], sizes: list[int], skip: bool) -> None:
    tokenizer = tiny_tokenizer(kind)
    if not has_half_good_run(tokenizer, prompt + output, skip):
        assert whole_text(tokenizer, prompt + output, skip) == tokenizer.decode(prompt + output, skip)
    expected = expected_text(tokenizer, prompt, output, skip)
    for pieces in (cut(output, sizes), [[i] for i in output], [output]):
        detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=skip)
        assert "".join(streamed(detokenizer, pieces)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_joined_are_the_text_behind_the_prompt_for_any_cut(kind):
    @settings(max_examples=max(CASES // 4, 10), deadline=None, derandomize=True, database=None)
    @given(cases(kind))
    def run(case):
        check(kind, *case)

    run()


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_joined_are_the_text_behind_the_prompt_in_many_random_cases(kind):
    rng = random.Random(kind)
    for _ in range(CASES):
        prompt = random_ids(rng, kind, 4) if rng.random() < 0.5 else []
        sizes = [rng.randrange(1, 6) for _ in range(5)]
        check(kind, prompt, random_ids(rng, kind, 12), sizes, rng.random() < 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_prompt_and_without_broken_runs_it_is_decode_of_the_output(kind):
    tokenizer = tiny_tokenizer(kind)
    rng = random.Random(0)
    words = ["é你😀👩\u200d👩\u200d👧", "the", "quick", "fox's", "12", "<s>", "</s>\n"]
    for _ in range(200):
        text = rng.choice(["", " "]).join(rng.choices(words, k=rng.randrange(1, 9)))
        ids = tokenizer.encode(text)
        for skip in (False, True):
            detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
            assert "".join(streamed(detokenizer, [[i] for i in ids])) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=CASES // 8, deadline=None, derandomize=True, database=None)
@given(ids_of("byte_level"))
@example([3 + 0xFF] * 50)
def test_after_every_token_exactly_the_certain_text_is_out(ids):
    """So nothing is held back longer than a character, and nothing that could still change is shown."""
    tokenizer = tiny_tokenizer("byte_level")
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    text, data = "", b""
    for i in ids:
        text += detokenizer.append([i])
        data += tokenizer.token_bytes(i)
        assert text == without_split_character(data).decode("utf-8", "replace")


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_at_most_three_bytes_wait(kind):
    tokenizer = tiny_tokenizer(kind)
    for bad in (b"\xff", b"\x80", b"\xf0", b"\xf0\x9f", b"\xe4\xbd"):
        detokenizer = IncrementalDetokenizer(tokenizer)
        ids = [ids_by_byte(tokenizer)[b] for b in bad * 30]
        shown = "".join(detokenizer.append([i]) for i in ids)
        whole = shown + detokenizer.flush()
        assert set(whole) == {"\ufffd"}
        assert len(whole) - len(shown) <= 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["bad bytes", "text", "hidden", "beyond"])
def test_the_work_per_token_does_not_grow(kind, what, monkeypatch):
    tokenizer = tiny_tokenizer(kind)
    ids = {
        "bad bytes": [ids_by_byte(tokenizer).get(0xFF, 3)],
        "text": tokenizer.encode(TEXT[0] + TEXT[2], add_special_tokens=False),
        "hidden": [tokenizer.eos_token_id],
        "beyond": [tokenizer.vocab_size + 5],
    }[what]
    ids = (ids * 2000)[:2000]
    work = 0
    decode = Tokenizer.decode

    def counted(self, token_ids, skip_special_tokens=False):
        nonlocal work
        work += len(token_ids)
        return decode(self, token_ids, skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=ids)
    for i in ids:
        detokenizer.append([i])
    assert work <= 8 * len(ids)
    if isinstance(detokenizer._text, _PieceText):
        assert len(detokenizer._text._byte_ids) <= 3


def test_a_leading_blank_is_kept_behind_a_prompt_and_not_without_one():
    tokenizer = tiny_tokenizer("byte_fallback")
    hello = tokenizer.encode("Hello", add_special_tokens=False)
    assert IncrementalDetokenizer(tokenizer).append(hello) == "Hello"
    assert IncrementalDetokenizer(tokenizer, [tokenizer.bos_token_id]).append(hello) == "Hello"
    assert IncrementalDetokenizer(tokenizer, tokenizer.encode("a")).append(hello) == " Hello"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_that_the_prompt_began_belongs_to_the_output(kind):
    tokenizer = tiny_tokenizer(kind)
    ids = [ids_by_byte(tokenizer)[b] for b in "😀".encode()]
    for split in range(1, 4):
        detokenizer = IncrementalDetokenizer(tokenizer, ids[:split])
        assert "".join(streamed(detokenizer, [ids[split:]])) == "😀"


def test_good_characters_of_a_broken_byte_run_stay():
    tokenizer = tiny_tokenizer("byte_fallback")
    ids = [3 + byte for byte in "é".encode() + b"\xff" + "你".encode()]
    assert "".join(streamed(IncrementalDetokenizer(tokenizer), [ids])) == "é\ufffd你"


def test_special_tokens_are_hidden_or_shown():
    tokenizer = tiny_tokenizer("word_piece")
    the, bos, eos = tokenizer.encode("the")[0], tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = [the, bos, eos, the]
    assert "".join(streamed(IncrementalDetokenizer(tokenizer), [ids])) == "the the"
    shown = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    assert "".join(streamed(shown, [ids])) == "the <s> </s> the"
    joined = IncrementalDetokenizer(tokenizer, skip_special_tokens=False, spaces_between_special_tokens=False)
    assert "".join(streamed(joined, [ids])) == "the <s></s> the"


@settings(max_examples=CASES // 8, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_an_empty_append_and_a_second_flush_add_nothing(data):
    kind = data.draw(st.sampled_from(KINDS))
    detokenizer = IncrementalDetokenizer(tiny_tokenizer(kind))
    detokenizer.append(data.draw(ids_of(kind, 6)))
    assert detokenizer.append([]) == ""
    detokenizer.flush()
    assert detokenizer.flush() == ""
