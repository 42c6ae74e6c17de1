"""Cuts a request into pieces for several workers, so that what shares leading layers stays together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from .grid import Factors


def shared_depth(one: Factors, other: Factors) -> int:
    """How many leading factors two vectors have in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def cut_into_chunks(vectors: Sequence[Factors], num_chunks: int) -> list[list[Factors]]:
    """Cuts the distinct vectors, sorted, into pieces of similar work, between those that share the least.

    Args:
        vectors: may repeat.
        num_chunks: how many pieces at most.

    Returns:
        The pieces, in order; vectors that share a prefix are next to each other.
    """
    chunks = [sorted(set(vectors))]
    while len(chunks) < num_chunks:
        number = max(range(len(chunks)), key=lambda n: (len(chunks[n]) > 1, work(chunks[n])))
        chunk = chunks[number]
        if len(chunk) < 2:
            break
        # A piece runs its first vector in full, so a cut through a common prefix makes both halves longer.
        cut = min(range(1, len(chunk)), key=lambda at: max(work(chunk[:at]), work(chunk[at:])))
        chunks[number : number + 1] = [chunk[:cut], chunk[cut:]]
    return [chunk for chunk in chunks if chunk]


def work(chunk: Sequence[Factors]) -> int:
    """Layers that a worker runs which knows none of them yet."""
    if not chunk:
        return 0
    return len(chunk[0]) + sum(len(b) - shared_depth(a, b) for a, b in pairwise(chunk))
