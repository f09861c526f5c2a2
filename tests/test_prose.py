"""Documents are in plain English: no sentence of more than 25 words. Code, tables and headings are left out."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST = 25
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / ".github" / "pull_request_template.md"])
SHORT_FORMS = re.compile(r"\b(e\.g|i\.e|vs|cf|al|Fig|Eq|No)\.(?=\s)")


def paragraphs(text: str) -> list[str]:
    """The prose of a document: paragraphs and items of lists, each in one line."""
    text = re.sub(r"^(```|~~~).*?^\1", "\n", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->|<svg.*?</svg>", "", text, flags=re.DOTALL)
    blocks: list[str] = []
    go_on = False
    for line in text.splitlines():
        words = line.strip()
        if not words or words.startswith(("|", "#", "![", "<", ":::", "---")):
            go_on = False
            continue
        if item := re.match(r"(?:[-*+]|\d+\.)\s+(?:\[[ x]\]\s+)?", words):
            words, go_on = words[item.end() :], False
        if go_on:
            blocks[-1] += " " + words
        else:
            blocks.append(words)
        go_on = True
    return blocks


def sentences(paragraph: str) -> list[str]:
    """A paragraph cut after each full stop, question and exclamation mark; code counts as one word."""
    paragraph = re.sub(r"`[^`]+`", "CODE", paragraph)
    paragraph = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)
    paragraph = SHORT_FORMS.sub(r"\1", paragraph)
    return [s for s in re.split(r"(?<=[.!?])[)\"'*]*\s+(?=[^a-z\s])", paragraph) if s]


def n_words(sentence: str) -> int:
    return sum(any(c.isalnum() for c in word) for word in sentence.split())


def too_long(text: str) -> list[str]:
    spoken = [sentence for paragraph in paragraphs(text) for sentence in sentences(paragraph)]
    return [f"{n_words(sentence)} words: {sentence}" for sentence in spoken if n_words(sentence) > MOST]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_sentences_are_short(path: Path) -> None:
    offending = too_long(path.read_text(encoding="utf-8"))
    assert not offending, f"{path.relative_to(ROOT)}: at most {MOST} words a sentence:\n" + "\n".join(offending)


def test_long_sentences_are_seen() -> None:
    """The check of the check: what counts as a sentence, and what is left out."""
    words = " ".join(["Word"] * 25)
    assert not too_long(f"{words}. {words}.")
    assert len(too_long(f"{words} more.")) == 1
    assert len(too_long(f"{words}\nmore.")) == 1, "a sentence goes on in the next line"
    assert not too_long(f"- {words}\n- {words}"), "items of a list are sentences of their own"
    assert len(too_long(f"{words}; more.")) == 1, "a semicolon ends no sentence"
    assert len(too_long(f"{words} e.g. more.")) == 1
    assert not too_long(f"```\n{words} more\n```\n| {words} more |\n# {words} more")
    assert not too_long(f"`{words} more` is code.")
    assert not too_long("Half. " * 30)
