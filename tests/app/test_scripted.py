"""The app in a real browser, before a server that says what a test has written down."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.app.model import Model, calls, continues, event, says
from tests.app.view import View
from tests.app.web_app import FOLDER
from tests.scripted_server import chat_event

WEATHER = '{"location":"Tokyo","unit":"celsius"}'
TOKYO = {"location": "Tokyo", "temperature": 24, "unit": "celsius", "condition": "sunny"}  # as lib/tools.ts makes it up
RECIPE: dict[str, Any] = {
    "name": "Soup",
    "servings": 2,
    "prepTime": 10,
    "cookTime": 20,
    "difficulty": "easy",
    "ingredients": [{"item": "leek", "amount": 1.5, "unit": "kg"}, {"item": "salt", "amount": 1, "unit": "g"}],
    "instructions": ["Cut the leek.", "Cook it all."],
}


# ------------------------------------------------------------------ chat
def test_text_appears_word_by_word(view: View, model: Model):
    model.will(says("One", " two", "\nthree"), is_paced=True)
    view.open()
    view.send("Count.")
    expect(view.page.locator(".user .text")).to_have_text("Count.")
    expect(view.button).to_have_text("Stop")
    for text in ("One", "One two", "One two\nthree"):
        model.give()
        expect(view.answer).to_have_text(text, use_inner_text=True)
        assert view.facts.count() == 0
    model.give(3)
    expect(view.facts).to_have_text(re.compile(r"^11 tokens read · 5 written · [\d.]+ tok/s$"))
    (body,) = model.bodies
    assert (body["model"], body["stream"], "tools" in body) == ("scripted", True, False)
    assert body["messages"] == [{"role": "user", "content": "Count."}]
    assert {asked.headers.get("Authorization") for asked in model.asked} == {"Bearer secret"}


def test_stop_closes_the_connection_and_the_talk_goes_on(view: View, model: Model):
    view.open()
    for word, stop in (("half", view.button.click), ("a bit", lambda: view.page.keyboard.press("Escape"))):
        model.gone.clear()
        model.hold.clear()
        model.will([event(chat_event(content=word))])
        view.send("Go.")
        expect(view.answer).to_have_text(word)
        stop()
        view.wait_for_end()
        assert model.gone.wait(180)
        expect(view.facts).to_have_text("broken off")
    model.hold.set()
    model.will(says("whole", finish_reason="length"))
    view.send("Again.")
    expect(view.answer).to_have_text("whole")
    expect(view.facts).to_contain_text("cut at the limit")
    roles = [message["role"] for message in model.bodies[-1]["messages"]]
    assert roles == ["user", "assistant"] * 2 + ["user"]
    view.page.get_by_role("button", name="New chat").click()
    expect(view.page.locator(".message")).to_have_count(0)


def test_a_tool_call_is_shown_in_each_of_its_states(view: View, model: Model):
    model.will(calls("weather", WEATHER[:19], WEATHER[19:]), is_paced=True)
    model.will(says("Cloudy."))
    view.open()
    view.send("Tokyo?", tool="weather")
    model.give(2)
    expect(view.tool.locator(".state")).to_have_text("is being called")
    expect(view.tool.locator(".input")).to_have_text('{"location":"Tokyo"}')
    model.give(4)
    expect(view.tool.locator(".state")).to_have_text("running")
    expect(view.tool.locator(".input")).to_have_text(WEATHER)
    expect(view.tool.locator(".state")).to_have_text("done")
    assert json.loads(view.tool.locator(".output").inner_text()) == TOKYO
    expect(view.answer).to_have_text("Cloudy.")
    first, second = model.bodies
    assert sorted(tool["function"]["name"] for tool in first["tools"]) == ["calculator", "weather"]
    assert first["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert second["tool_choice"] == "none"
    call, result = second["messages"][1:]
    assert call["tool_calls"][0]["function"] == {"name": "weather", "arguments": WEATHER}
    assert result["role"] == "tool" and json.loads(result["content"]) == TOKYO


def test_a_tool_that_fails_says_why_and_the_model_is_told(view: View, model: Model):
    model.will(calls("calculator", '{"expression":"2 + x"}'))
    model.will(says("Sorry."))
    view.open()
    view.send("2 + x?", tool="auto")
    expect(view.tool.locator(".state")).to_have_text("failed")
    expect(view.tool.locator(".output")).to_have_text("x where a number belongs")
    expect(view.answer).to_have_text("Sorry.")
    assert [body["tool_choice"] for body in model.bodies] == ["auto", "auto"]
    assert "x where a number belongs" in model.bodies[1]["messages"][-1]["content"]


def test_a_call_that_was_stopped_does_not_stay_in_the_way(view: View, model: Model):
    model.hold.clear()
    model.will(calls("weather", '{"loc')[:-3])
    view.open()
    view.send("Tokyo?", tool="weather")
    expect(view.tool.locator(".state")).to_have_text("is being called")
    view.button.click()
    view.wait_for_end()
    expect(view.tool.locator(".state")).to_have_text("stopped")
    model.hold.set()
    model.will(says("Hello."))
    view.send("Hello?", tool="off")
    expect(view.answer).to_have_text("Hello.")


def test_reasoning_is_folded_away(view: View, model: Model):
    model.will([event(chat_event(reasoning_content="Hm, hm.")), *says("Yes.")])
    view.open()
    view.send("Well?")
    expect(view.answer).to_have_text("Yes.")
    reasoning = view.page.locator(".reasoning")
    assert reasoning.get_attribute("open") is None
    expect(reasoning).to_contain_text("Hm, hm.")


def test_a_model_that_writes_html_writes_text(view: View, model: Model):
    evil = "<img src=x onerror=\"document.title='owned'\">"
    model.will(says(evil))
    view.open()
    view.send(evil)
    expect(view.answer).to_have_text(evil)
    expect(view.page.locator(".user .text")).to_have_text(evil)
    assert view.page.title() != "owned"


# ------------------------------------------------------------------ what goes wrong
@pytest.mark.parametrize("path", ["/", "/completion", "/object"])
def test_a_refusal_is_shown_in_the_servers_words_and_can_be_tried_again(view: View, model: Model, path: str):
    view.open(path)
    model.will_refuse(400, "that is too long")
    view.send("Hello.")
    expect(view.trouble).to_contain_text("The model server answers 400: that is too long")
    view.wait_for_end()
    model.status = 200
    model.will(continues("fine") if path == "/completion" else says(json.dumps(RECIPE)))
    view.trouble.get_by_role("button", name="Try again").click()
    expect(view.trouble).to_have_count(0)
    view.wait_for_end()
    first, second = model.bodies
    assert first == second


def test_a_wrong_key_is_named(view: View, model: Model):
    view.open()
    model.will_refuse(401, "Invalid API key.")
    view.send("Hello.")
    expect(view.trouble).to_contain_text("Invalid API key. Is VLLM_API_KEY the server's key?")


def test_an_answer_that_breaks_off_keeps_its_words_and_says_so(view: View, model: Model):
    broken = event({"error": {"message": "The server is shutting down.", "type": "x", "code": 503}})
    for path, answer, words in (
        ("/", says("half"), ".assistant .text"),
        ("/completion", continues("half"), ".completion"),
    ):
        view.open(path)
        model.will([answer[0], broken])
        view.send("Hello.")
        expect(view.trouble).to_contain_text("The server is shutting down.")
        expect(view.page.locator(words)).to_have_text("half")
    view.open("/object")
    model.will([*says('{"name": "Soup"')[:1], broken], is_paced=True)
    view.send("soup")
    model.give()
    expect(view.page.locator(".recipe h1")).to_have_text("Soup")
    model.give()
    expect(view.trouble).to_contain_text("The answer broke off.")
    expect(view.page.locator(".recipe h1")).to_have_text("Soup")


# ------------------------------------------------------------------ completion and object
def test_a_text_is_continued_as_it_was_typed(view: View, model: Model):
    model.will(continues(" a", " time"), is_paced=True)
    view.open("/completion")
    view.page.get_by_label("temperature").fill("0.3")
    view.page.get_by_label("tokens", exact=True).fill("9")
    view.send("Once upon")
    for text in (" a", " a time"):
        model.give()
        expect(view.page.locator(".completion")).to_have_text(text, use_inner_text=True)
    model.give(2)
    view.wait_for_end()
    (body,) = model.bodies
    assert "/v1/completions" in {asked.path for asked in model.asked}
    assert (body["prompt"], body["temperature"], body["max_tokens"]) == ("Once upon", 0.3, 9)
    assert "stop" not in body


def test_a_completion_stops(view: View, model: Model):
    model.hold.clear()
    model.will(continues("half")[:1])
    view.open("/completion")
    view.send("Once")
    expect(view.page.locator(".completion")).to_have_text("half")
    view.button.click()
    view.wait_for_end()
    assert model.gone.wait(180)
    assert view.trouble.count() == 0


def test_an_object_grows_and_follows_its_schema(view: View, model: Model):
    text = json.dumps(RECIPE)
    cut = text.index("salt")
    model.will(says(text[:cut], text[cut:]), is_paced=True)
    view.open("/object")
    view.send("soup")
    model.give()
    expect(view.page.locator(".recipe li")).to_have_text(["1.5 kg leek", ""])
    expect(view.page.locator(".outcome")).to_have_text("The model writes …")
    model.give(4)
    expect(view.page.locator(".outcome")).to_have_text("Complete: it follows the schema.")
    expect(view.page.locator(".recipe h1")).to_have_text("Soup")
    expect(view.page.locator(".recipe li")).to_have_text(["1.5 kg leek", "1 g salt", *RECIPE["instructions"]])
    assert json.loads(view.page.locator(".recipe pre").text_content() or "") == RECIPE
    schema = model.bodies[0]["response_format"]["json_schema"]["schema"]
    assert schema["required"] == list(RECIPE)
    assert schema["properties"]["instructions"]["maxItems"] == 4


def test_an_object_that_is_cut_or_stopped_says_so(view: View, model: Model):
    view.open("/object")
    model.will(says('{"name": "Soup"', finish_reason="length"))
    view.send("soup")
    expect(view.page.locator(".outcome")).to_have_text("It was cut short.")
    model.hold.clear()
    model.will([event(chat_event(content='{"name": "Stew"'))])
    view.send("stew")
    expect(view.page.locator(".recipe h1")).to_have_text("Stew")
    view.button.click()
    expect(view.page.locator(".outcome")).to_have_text("Stopped.")
    assert model.gone.wait(180)


@pytest.mark.parametrize("path", ["/", "/completion", "/object"])
def test_whoever_leaves_the_page_stops_its_answer(view: View, model: Model, path: str):
    model.hold.clear()
    model.will((continues("{") if path == "/completion" else says("{"))[:1])
    view.open(path)
    view.send("Hello.")
    expect(view.button).to_have_text("Stop")
    wait_for_question(view, model)
    view.page.get_by_role("link", name="Object" if path == "/" else "Chat").click()
    assert model.gone.wait(180)


def wait_for_question(view: View, model: Model) -> None:
    """Until the model server has been asked."""
    for _ in range(1800):
        if model.bodies:
            return
        view.page.wait_for_timeout(100)
    raise TimeoutError("nobody asked the model")


# ------------------------------------------------------------------ looks
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 1280])
def test_everything_has_its_place(view: View, model: Model, scheme: str, width: int):
    """No page is wider than its screen, the field is in sight, and ink and ground are far apart."""
    view.page.set_viewport_size({"width": width, "height": 700})
    view.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    view.open()
    model.will(says("word " * 300 + "unbreakable" * 40))
    view.send("long " * 60)
    expect(view.facts).to_contain_text("tok/s")
    for name in ("Chat", "Completion", "Object"):
        view.page.get_by_role("link", name=name).click()
        expect(view.page.get_by_role("link", name=name)).to_have_attribute("aria-current", "page")
        assert view.page.evaluate("document.documentElement.scrollWidth") == width
        for part in (view.button, view.page.locator("textarea"), view.panel.locator("h2")):
            box = part.bounding_box()
            assert box and box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= 700
        row = view.page.locator(".row").bounding_box()
        assert row and row["height"] < 50, "the buttons do not fit into one row"
    colours = view.page.evaluate(
        "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
    )
    ink, ground = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in colours)
    assert abs(ink - ground) > 0.7 and (ink < ground) == (scheme == "light")


# ------------------------------------------------------------------ without a browser
EXPRESSIONS = ["25 * 4 + 10", "2 - 3 - 4", "-(1.5 + .5) * 3", "8 / 4 / 2", "2*(3+(4-1))", "--7"]


@pytest.mark.usefixtures("packages")
def test_the_calculator_counts_as_python_does():
    script = (
        "import { calculate } from './lib/calculate.ts';"
        "const tell = (text) => { try { return calculate(text); } catch (error) { return error.message; } };"
        "console.log(JSON.stringify(JSON.parse(process.argv[1]).map(tell)));"
    )
    wrong = {
        "2 + x": "x where a number belongs",
        "2 +": "the end where a number belongs",
        "(1": "a ) is missing in (1",
        "1 2": "2 where an operator belongs",
        "1)": ") where an operator belongs",
        "process.exit()": "p where a number belongs",
    }
    node = FOLDER / "node_modules" / ".bin" / "node"
    command = [str(node), "--input-type=module", "-e", script, json.dumps([*EXPRESSIONS, *wrong])]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == [*(eval(text) for text in EXPRESSIONS), *wrong.values()]


def test_the_lock_file_names_no_registry():
    lock = json.loads((FOLDER / "package-lock.json").read_text())
    packages = [package for path, package in lock["packages"].items() if path]
    assert packages and all("integrity" in package and "resolved" not in package for package in packages)
