"""Figures of tokens: complete, escaped, without a script, and saying what the numbers say."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minivllm import LLM, InvalidRequestError, SamplingParams
from minivllm.figures import Figure, Token, compare, compare_tokens, token_heatmap
from minivllm.figures.heatmap import BLUE, ORANGE, STRONGEST
from minivllm.outputs import CompletionOutput, Logprob, RequestOutput

TEXTS = ["The", " cat", "<b>&\n", "", "\tend"]


class Page(HTMLParser):
    """Tags, and what the tokens say."""

    VOID = frozenset({"br", "wbr", "meta"})

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.titles: list[str] = []
        self.styles: list[str] = []
        self.classes: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        found = dict(attrs)
        if "token" in (found.get("class") or "").split():
            self.titles.append(found.get("title") or "")
            self.styles.append(found.get("style") or "")
            self.classes.append((found.get("class") or "").removeprefix("token").strip())

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(figure: Figure) -> Page:
    page = Page(figure._repr_html_())
    assert page.open == [], "every tag is closed"
    assert not page.tags & {"script", "link", "img", "iframe"} and "http" not in figure.html
    style = figure.html.split("</style>")[0].split("<style>")[1]
    selectors = [selector.strip() for selector in re.findall(r"(?:^|\})([^{}]+)\{", style)]
    assert len(selectors) > 10, "the styles are there"
    assert all(s.startswith((".minivllm-figure", "@media")) for s in selectors), "no rule reaches beyond the figure"
    return page


def output_of(token_ids: list[int], logprobs: list[dict[int, float]] | None = None) -> RequestOutput:
    entries = None
    if logprobs is not None:
        entries = [
            {token_id: Logprob(value, rank, f" t{token_id}") for rank, (token_id, value) in enumerate(one.items(), 1)}
            for one in logprobs
        ]
    answer = CompletionOutput(0, "", token_ids, logprobs=entries, finish_reason="length")
    return RequestOutput("1-a", "text", [7, 8], [answer], True)


# ------------------------------------------------------------------ heatmap
def test_a_heatmap_of_texts_escapes_them_and_shows_blanks():
    figure = token_heatmap(TEXTS, [0.0, 1.0, 2.0, None, 4.0], title="a < b")
    page = page_of(figure)
    assert len(page.titles) == 5 and "&lt;b&gt;&amp;" in figure.html and "a &lt; b" in figure.html
    assert [sign for sign in "·⏎∅⇥" if sign not in figure.html] == []
    opacities = [float(re.findall(r"[\d.]+\)", style)[0][:-1]) if style else None for style in page.styles]
    assert opacities == [0.0, STRONGEST / 4, STRONGEST / 2, None, STRONGEST]
    assert page.classes[3] == "unknown" and "value 4" in page.titles[4]


def test_values_below_zero_have_the_other_colour_on_one_scale():
    page = page_of(token_heatmap(["a", "b"], [-2.0, 1.0]))
    assert BLUE in page.styles[0] and f"{STRONGEST:.3f}" in page.styles[0]
    assert ORANGE in page.styles[1] and f"{STRONGEST / 2:.3f}" in page.styles[1]


def test_surprise_and_entropy_are_those_of_the_logprobs():
    half, sure = math.log(0.5), math.log(0.9999)
    output = output_of([3, 4], [{3: half, 9: half}, {4: sure}])
    surprise, entropy = page_of(token_heatmap(output)), page_of(token_heatmap(output, "entropy"))
    assert "value 0.6931" in surprise.titles[0] and "probability 0.5, rank 1\ninstead: ' t9' 0.5" in surprise.titles[0]
    assert f"value {-sure:.4g}" in surprise.titles[1]
    assert "value 0.6931" in entropy.titles[0] and "value 0.001021" in entropy.titles[1]
    assert f"{STRONGEST:.3f}" in entropy.styles[0]


def test_entropy_never_exceeds_that_of_the_whole_distribution():
    whole = [0.4, 0.3, 0.2, 0.1]
    truth = -sum(p * math.log(p) for p in whole)
    values = []
    for count in range(1, 5):
        logprobs = {index: Logprob(math.log(p)) for index, p in enumerate(whole[:count])}
        entropy = Token("a", 0, logprobs=logprobs).entropy
        assert entropy is not None
        values.append(entropy)
    assert values == sorted(values) and math.isclose(values[-1], truth)


def test_numbers_may_be_for_the_answer_or_for_the_prompt_too():
    output = output_of([3, 4])
    assert len(page_of(token_heatmap(output, [1.0, 2.0])).titles) == 2
    figure = token_heatmap(output, [1.0, 2.0, 3.0], show_values=True)  # all but the newest
    assert "[7]" in figure.html and ">prompt<" in figure.html and ">answer<" in figure.html
    assert "<small>3</small>" in figure.html and "[4]" not in figure.html
    with pytest.raises(InvalidRequestError, match=r"2 numbers \(the answer's tokens\) or 4"):
        token_heatmap(output, [1.0])


def test_bad_arguments_are_named():
    with pytest.raises(InvalidRequestError, match="ask for them"):
        token_heatmap(output_of([3]))
    with pytest.raises(InvalidRequestError, match="logprob, entropy or numbers"):
        token_heatmap(output_of([3]), "colour")
    with pytest.raises(InvalidRequestError, match="candidate must be 0 to 0"):
        token_heatmap(output_of([3]), candidate=1)
    with pytest.raises(InvalidRequestError, match="a RequestOutput or a list of texts"):
        token_heatmap("a text", [1.0])
    with pytest.raises(InvalidRequestError, match=r"as many outputs as a \(2\), got 1"):
        compare([output_of([3])] * 2, output_of([3]))


# ------------------------------------------------------------------ comparison
def test_the_first_difference_is_marked_in_both_runs_and_the_rest_is_faint():
    a = output_of([3, 4, 5], [{3: -0.5}, {4: -1.0, 9: -1.25}, {5: 0.0}])
    b = output_of([3, 9], [{3: -0.625}, {9: -1.0, 4: -1.5}])
    figure = compare(a, b, labels=("before", "<after>"))
    assert page_of(figure).classes == ["", "first", "after", "", "first"]
    assert "First difference at token 1 of 3 and 2." in figure.html and "&lt;after&gt;" in figure.html
    assert "There each preferred its own by 0.25 and 0.5 nats." in figure.html
    assert "Largest |Δlogprob| before: 0.12, at token 0." in figure.html


def test_equal_runs_say_so_and_a_run_that_ends_early_differs():
    same = compare(TEXTS, list(TEXTS))
    assert "All 5 tokens are equal." in same.html and set(page_of(same).classes) == {""}
    shorter = compare(TEXTS, TEXTS[:3])
    assert "First difference at token 3 of 5 and 3." in shorter.html and ">end<" in shorter.html
    result = compare_tokens([], [])
    assert (result.num_equal, result.first_difference, result.max_delta) == (0, None, None)


def test_many_requests_are_compared_one_by_one():
    figure = compare([output_of([3]), output_of([4])], [output_of([3]), output_of([5])])
    assert "1 of 2 requests differ" in figure.html and "request 1" in figure.html
    assert page_of(figure).classes == ["", "", "first", "first"]


# ------------------------------------------------------------------ what an engine returns
def test_figures_of_a_real_run(tiny_model: Callable[[str], Path], tmp_path: Path):
    llm = LLM(model=str(tiny_model("llama")), dtype="float32", kv_cache_memory_bytes=16 << 20)
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=4, prompt_logprobs=2, ignore_eos=True)
    with llm.capture("layers.1") as captured:
        output = llm.generate("The fox", params, use_tqdm=False)[0]
    answer = output.outputs[0]
    assert answer.logprobs is not None
    page = page_of(token_heatmap(output))
    assert len(page.titles) == len(output.prompt_token_ids) + 6
    assert f"value {-answer.logprobs[5][answer.token_ids[5]].logprob:.4g}" in page.titles[-1]
    assert page.classes[0] == "unknown", "nothing predicts the first token"
    norms = captured.of(output).norm(dim=-1)
    figure = token_heatmap(output, norms, tokenizer=llm.get_tokenizer())
    assert f"value {float(norms[-1]):.4g}" in page_of(figure).titles[-1]
    with llm.hook("layers.1", lambda values, context: -values):
        other = llm.generate("The fox", params, use_tqdm=False)[0]
    assert "First difference" in compare(output, other).html
    saved = figure.save(tmp_path / "figure.html").read_text(encoding="utf-8")
    assert saved.startswith("<!doctype html>") and figure.html in saved
    assert Page(saved).open == []
