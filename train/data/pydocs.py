"""The text that every Python carries: the reference documentation behind `help()`."""

from pydoc_data.topics import topics

from zoo.train.data.text import Document, TextData


class PyDocs(TextData):
    """The English documentation topics of the standard library: about 79 documents, 0.46 MB; nothing to download.

    One topic is one document, and every tenth byte or so is held out in whole topics. The text differs a little from
    one Python version to the next, so compare numbers of one version.
    """

    def documents(self) -> list[Document]:
        """One per topic, sorted by name."""
        return [Document(name, topics[name]) for name in sorted(topics)]
