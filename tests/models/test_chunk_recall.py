"""Recall inside one chunk, and across chunks, where what is looked up by content has no path of its own."""

import importlib.util
from pathlib import Path

import pytest

pytestmark = [pytest.mark.everything]


def test_recall_needs_the_pair_and_its_query_in_one_chunk() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "chunk_recall.py"
    spec = importlib.util.spec_from_file_location("chunk_recall", path)
    assert spec is not None
    assert spec.loader is not None
    chunk_recall = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chunk_recall)
    whole, cut = (chunk_recall.run("tcnca", chunk_size=size) for size in (16, 4))
    assert whole > 0.9  # measured: 0.961; chance is 0.25
    assert 0.3 < cut < 0.65  # measured: 0.517, through the convolutions alone
