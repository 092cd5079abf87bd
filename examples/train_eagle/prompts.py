"""Chat prompts made here: forms of request × topics, and requests about passages of Python's own documentation strings.

Everything is written for this file or is of the standard library (PSF licence) of the Python that runs it. Topics, people
and passages are split by a hash, so that a prompt held out is about something that no other prompt is about. What
`heldout.txt` names is held out too, and so is a prompt that has most of the words of one of its lines in a row.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from .topics import ACTIVITIES, COUNTRIES, FORMS, HEARD, NAMES, PLACES, THINGS, TOPICS, WORDS

HELD_OUT_OF_256 = 24


@cache
def held_out(key: str) -> bool:
    """Whether a topic, a person, a file or a whole prompt belongs to the part held out."""
    return hashlib.sha256(key.encode()).digest()[0] < HELD_OUT_OF_256 or f" {' '.join(_words_of(key))} " in _written()[0]


def resembles_held_out(text: str) -> bool:
    """Whether three quarters of the words of a line of `heldout.txt` are in `text`, one behind the other."""
    words = _words_of(text)
    for size, runs in _written()[1].items():
        if any(tuple(words[i : i + size]) in runs for i in range(len(words) - size + 1)):
            return True
    return False


def written() -> list[str]:
    """The prompts of `heldout.txt`."""
    return (Path(__file__).parent / "heldout.txt").read_text().splitlines()


def _words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@cache
def _written() -> tuple[str, dict[int, set[tuple[str, ...]]]]:
    """All words of `heldout.txt`, and the runs of them that no other prompt may have, by their length."""
    lines = [_words_of(line) for line in written()]
    runs: dict[int, set[tuple[str, ...]]] = {}
    for words in lines:
        size = -(-len(words) * 3 // 4)
        runs.setdefault(size, set()).update(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
    return " | ".join(f" {' '.join(words)} " for words in lines), runs


def prompts(count: int, seed: int, *, held: bool) -> list[str]:
    """`count` different prompts, of the part held out or of the other."""
    rng = random.Random(f"{seed} {held}")
    passages = [text for key, text in _passages() if held_out(key) == held]
    makers: list[tuple[Callable[[], str], int]] = [
        (lambda: _about_topic(rng, held), 10),
        (lambda: _about_passage(rng, passages), 4),
        (lambda: _story(rng, held), 2),
        (lambda: _arithmetic(rng), 1),
        (lambda: _words(rng, held), 2),
        (lambda: _talk(rng, held), 2),
        (lambda: _code(rng, held), 1),
    ]
    found: dict[str, None] = {}
    tries = 0
    while len(found) < count and tries < 40 * count + 1000:
        tries += 1
        [maker] = rng.choices([maker for maker, _ in makers], [weight for _, weight in makers])
        text = maker()
        if held_out(text) == held and not resembles_held_out(text):  # some forms name no topic
            found[text] = None
    return list(found)


def _pick(rng: random.Random, values: list[str], held: bool) -> str:
    """One of the values that belong to this part."""
    while True:
        value = rng.choice(values)
        if held_out(value) == held:
            return value


def _about_topic(rng: random.Random, held: bool) -> str:
    return rng.choice(FORMS).format(topic=_pick(rng, TOPICS, held), other=_pick(rng, TOPICS, held), n=rng.randint(2, 7))


def _about_passage(rng: random.Random, passages: list[str]) -> str:
    return rng.choice(HEARD).format(passage=rng.choice(passages), word=rng.choice(WORDS), n=rng.randint(1, 4))


def _story(rng: random.Random, held: bool) -> str:
    form = rng.choice(
        [
            "Write a short story about {who}, who {does} {where}.",
            "Tell me a story about {who} and a {thing} {where}.",
            "Write a poem about a {thing} {where}.",
            "Write the first paragraph of a novel in which {who} finds a {thing} {where}.",
            "Write a dialogue between {who} and {whom} about a {thing}.",
            "Write a letter from {who} to {whom} about a trip to {country}.",
            "{who} {does} {where}. What happens next?",
            "Describe a {thing} {where} in three sentences.",
            "Write an email in which {who} asks {whom} for a {thing}.",
            "{who} bought a {thing} in {country}. Invent a reason why.",
        ]
    )
    return form.format(
        who=_pick(rng, NAMES, held),
        whom=_pick(rng, NAMES, held),
        does=rng.choice(ACTIVITIES),
        where=rng.choice(PLACES),
        thing=_pick(rng, THINGS, held),
        country=_pick(rng, COUNTRIES, held),
    )


def _arithmetic(rng: random.Random) -> str:
    a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 12)
    form = rng.choice(
        [
            "What is {a} + {b}?",
            "What is {a} times {c}? Explain each step.",
            "Calculate {a} - {b}.",
            "If I have {a} apples and give away {c}, how many are left?",
            "A train travels {a} kilometres in {c} hours. What is its average speed?",
            "Solve for x: x + {a} = {b}.",
            "Is {a} a prime number? Why?",
            "Write the numbers from {c} to {d} in a list.",
            "What is {c} percent of {a}?",
            "How many minutes are there in {c} hours?",
        ]
    )
    return form.format(a=a, b=b, c=c, d=c + rng.randint(3, 12))


def _words(rng: random.Random, held: bool) -> str:
    form = rng.choice(
        [
            "What does the word '{word}' mean?",
            "Use the word '{word}' in a sentence.",
            "Give me {n} synonyms of '{word}'.",
            "What is the opposite of '{word}'?",
            "Write a sentence with the words '{word}' and '{thing}'.",
            "What is the capital of {country}?",
            "Tell me about {country}.",
            "What is {country} known for?",
            "What food is typical of {country}?",
            "Plan a trip of {n} days to {country}.",
            "Which countries have a border with {country}?",
            "What is a {thing} used for?",
            "Who invented the {thing}?",
            "Describe a {thing} to somebody who has never seen one.",
            "How do I choose a good {thing}?",
            "Name {n} kinds of {thing}.",
        ]
    )
    return form.format(
        word=_pick(rng, WORDS, held), thing=_pick(rng, THINGS, held), country=_pick(rng, COUNTRIES, held), n=rng.randint(2, 6)
    )


def _talk(rng: random.Random, held: bool) -> str:
    form = rng.choice(
        [
            "Hello! My name is {who}.",
            "Hi, I am {who} from {country}. Who are you?",
            "Good morning. What can you do for me?",
            "How are you today?",
            "Thank you for your help with my {thing}.",
            "I am bored. What should I do {where}?",
            "I feel sad because I lost my {thing}.",
            "My friend {who} is angry with me. What should I do?",
            "Give me advice: I want to learn about {topic}.",
            "Can you help me with my homework on {topic}?",
            "I have an interview tomorrow about {topic}. How do I prepare?",
            "What should I give {who} for a birthday? {who} likes {topic}.",
            "Do you like {topic}?",
            "What do you think about {topic}?",
            "Tell me a joke about {topic}.",
            "What is your favourite {thing}?",
            "{who} wants to start with {topic}. Any tips?",
        ]
    )
    return form.format(
        who=_pick(rng, NAMES, held),
        country=_pick(rng, COUNTRIES, held),
        thing=_pick(rng, THINGS, held),
        where=rng.choice(PLACES),
        topic=_pick(rng, TOPICS, held),
    )


def _code(rng: random.Random, held: bool) -> str:
    form = rng.choice(
        [
            "Write a Python function that counts how often '{word}' occurs in a text.",
            "Write a Python class for a {thing}.",
            "Write a Python program that prints the numbers from 1 to {n}.",
            "How do I {task} in Python?",
            "Write a Python function to {task}.",
            "Explain with an example how to {task}.",
            "Write an HTML page about {topic}.",
            "Write a SQL query for all rows of a table named {thing}.",
        ]
    )
    tasks = [
        "sort a list", "read a file", "reverse a string", "remove duplicates from a list", "compute a factorial",
        "open a web page", "merge two dictionaries", "find the largest number in a list", "parse JSON", "write to a file",
        "check whether a word is a palindrome", "compute the mean of numbers", "count words", "split a string",
        "raise an exception", "test a function", "find a prime number", "convert a string to a number", "use a loop",
    ]  # fmt: skip
    return form.format(
        word=_pick(rng, WORDS, held),
        thing=_pick(rng, THINGS, held),
        n=rng.randint(5, 100),
        task=_pick(rng, tasks, held),
        topic=_pick(rng, TOPICS, held),
    )


@cache
def _passages() -> list[tuple[str, str]]:
    return list(_read_passages())


def _read_passages() -> Iterator[tuple[str, str]]:
    """Key and text of paragraphs of documentation strings, of a length for a prompt."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")):
        if path.parent.name in {"site-packages", "dist-packages", "test", "idlelib", "encodings", "pydoc_data"}:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 60 <= len(text) <= 400 and ">>>" not in text:
                    yield path.name, text
