"""The text that every Python carries: the reference documentation behind `help()`."""

from collections.abc import Mapping
from pydoc_data.topics import topics

from zoo.train.data.text.base import Document, TextData

LONG = 40  # characters from which on a paragraph in two topics means that one quotes the other


class PyDocs(TextData):
    """The English documentation topics of the standard library: about 79 documents, 0.46 MB; nothing to download.

    One topic is one document. About a tenth of the bytes is held out in whole topics; topics that share a paragraph
    (many are sections of a longer one) stay on one side. Single sentences still occur on both: of the held-out words
    0.8 % lie in a run of twelve that training has too (50 of 6,251 in Python 3.11; runs of 30: none). The text differs
    a little from one Python version to the next: compare numbers of one version.
    """

    def documents(self) -> list[Document]:
        """One per topic, sorted by name."""
        groups = related(topics)
        return [Document(groups[name], topics[name]) for name in sorted(topics)]


def related(texts: Mapping[str, str]) -> dict[str, str]:
    """For each text, the first name among all those that share paragraphs with it, directly or through others."""
    groups = {name: {name} for name in texts}
    seen: dict[str, str] = {}
    for name in sorted(texts):
        for paragraph in texts[name].split("\n\n"):
            paragraph = " ".join(paragraph.split())
            other = seen.setdefault(paragraph, name) if len(paragraph) >= LONG else name
            if groups[other] is not groups[name]:
                groups[other] |= groups[name]
                for member in groups[name]:
                    groups[member] = groups[other]
    return {name: min(group) for name, group in groups.items()}
