"""The prompts of the golden cases.

Tiny models get random ids of lengths around the block size; the default model gets 32 texts of many kinds.
Called by make.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from golden.tiny import NUM_SPECIALS, TINY

PROMPT_LENGTHS = (1, 7, 15, 16, 17, 33, 63)  # around 16 and its multiples


def tiny_prompts(name: str) -> dict[int, list[int]]:
    """{length: token ids}. The even-numbered ones are prefixes of one sequence, the others of another: with a prefix
    cache they find each other's blocks."""
    vocab_size = TINY[name].config["vocab_size"]
    stream = np.random.Generator(np.random.PCG64([TINY[name].seed, 1]))
    draws = stream.random((2, max(PROMPT_LENGTHS)))  # random() only: the stream that numpy changes least
    sequences = (NUM_SPECIALS + np.floor(draws * (vocab_size - NUM_SPECIALS))).astype(int).tolist()
    return {length: sequences[index % 2][:length] for index, length in enumerate(PROMPT_LENGTHS)}


TINY_TEXTS = ("The quick brown fox", "über die Brücke: 1024", "def add(first, second):\n")
TINY_MESSAGES = [{"role": "user", "content": "What is a block?"}]
TINY_EMBEDDING_TEXTS = ("The lazy dog sleeps.", "El niño comió una manzana.")


class Prompt(NamedTuple):
    """One prompt of the default model: plain text, or messages for the chat template."""

    name: str
    content: str | list[dict[str, str]]
    prompt_logprobs: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        return {"prompt_text": self.content} if isinstance(self.content, str) else {"messages": self.content}


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


_LONG_STORY = (
    "The lighthouse on the northern cliff had been dark for eleven winters when Mara climbed its stairs again. "
    "She counted the steps aloud, as her father had taught her, and at step ninety-four she stopped, because the "
    "wood there had always complained. It did not complain now. Someone had replaced it with a board of pale new "
    "oak, planed smooth and nailed with care. Above her, behind the door of the lamp room, a small light moved from "
    "one side to the other and then stood still. She thought of the letters that had come every spring without a "
    "name, of the fishermen who said that the lamp had been seen burning on nights without a moon, and of the "
    "promise she had made and broken. The wind leaned against the tower. She could hear the sea working at the "
    "stones far below, patient as ever, and somewhere in the walls a shutter knocked twice, waited, and knocked "
    "again. Mara put her hand flat on the door. It was warm. She drew a breath, lifted the latch, and"
)

_LONG_NOTES = (
    "Meeting notes, Tuesday. Present: Anna, Boris, Chen, Dalia. 1. The old pump fails about twice a week; the new one "
    "arrives on the 14th and costs 2,350 euros. 2. Boris measured 71 litres per minute before the repair and 88 after "
    "it. 3. The greenhouse needs a second thermometer because the north corner is always colder. 4. Chen will ask the "
    "school whether the children can plant beans in May. 5. Dalia reports that the website had 1,204 visitors in "
    "March, three times as many as in February. 6. Nobody has found the missing key; a new lock costs 40 euros. "
    "7. The next meeting is on the 28th at half past six, and Anna brings the cake. Summarise these notes in two "
    "sentences and list who has to do what."
)

DEFAULT_PROMPTS: tuple[Prompt, ...] = (
    Prompt("one-token", "The"),
    Prompt("one-newline", "\n"),
    Prompt("capital", "The capital of France is", prompt_logprobs=True),
    Prompt("water", "Water boils at a temperature of", prompt_logprobs=True),
    Prompt("once", "Once upon a time, in a village between two rivers, there lived"),
    Prompt("recipe", "Ingredients:\n- 200 g flour\n- 3 eggs\n- 1 pinch of salt\n\nInstructions:\n1."),
    Prompt("letter", "Dear Mr. Hoffmann,\n\nthank you for your letter of 3 March. We regret to inform you that"),
    Prompt("python", "def fibonacci(n):\n    ", prompt_logprobs=True),
    Prompt(
        "python-class", "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
    ),
    Prompt("javascript", "function reverse(text) {\n  return "),
    Prompt("sql", "SELECT name, COUNT(*) FROM orders WHERE"),
    Prompt("html", "<html>\n<head><title>Hello</title></head>\n<body>\n"),
    Prompt("json", '{"name": "Ada", "born": 1815, "skills": ["mathematics", '),
    Prompt("german", "Die Hauptstadt von Deutschland ist"),
    Prompt("french", "Le petit chat noir est monté sur la table et"),
    Prompt("spanish", "Érase una vez un niño que vivía en una montaña y"),
    Prompt("japanese", "東京は日本の首都です。", prompt_logprobs=True),
    Prompt("russian", "Москва является столицей"),
    Prompt("emoji", "I love 🍕 and 🎉, but most of all I love 🐈"),
    Prompt("digits", "3.14159265358979", prompt_logprobs=True),
    Prompt("counting", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10,"),
    Prompt("sum", "12 + 30 = 42\n25 + 17 = 42\n8 + 34 ="),
    Prompt("repetition", "la la la la la la la la la la la la la la la la"),
    Prompt("spaces", "a  b   c    d     e      5   6\n\n\n7\t8", prompt_logprobs=True),
    Prompt("upper-case", "WARNING: DO NOT OPEN THIS DOOR WHILE THE"),
    Prompt("long-story", _LONG_STORY),
    Prompt("chat-hello", _user("Hello! Who are you?"), prompt_logprobs=True),
    Prompt("chat-gravity", _user("Explain gravity to a child in three sentences.")),
    Prompt("chat-code", _user("Write a Python function that checks whether a word is a palindrome.")),
    Prompt(
        "chat-system",
        [
            {"role": "system", "content": "You answer with one short sentence."},
            {"role": "user", "content": "Why is the sky blue?"},
        ],
    ),
    Prompt(
        "chat-turns",
        [
            {"role": "user", "content": "My name is Lena and I have two cats."},
            {"role": "assistant", "content": "Nice to meet you, Lena! What are the names of your cats?"},
            {"role": "user", "content": "Miko and Tofu. How many cats do I have?"},
        ],
        prompt_logprobs=True,
    ),
    Prompt("chat-notes", _user(_LONG_NOTES)),
)
