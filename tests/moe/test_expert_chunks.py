"""Chunks of rows, and how threads share the experts, by hand."""

from xmoe_fairseq.moe.experts.chunks import chunks, shares_of


def test_chunks_by_hand() -> None:
    counts = [100, 0, 150, 10, 300, 1, 2, 0]
    found = [(chunk.experts, chunk.counts, chunk.rows) for chunk in chunks(counts, 256)]
    assert found == [
        ([0, 2], [100, 150], slice(0, 250)),
        ([3], [10], slice(250, 260)),
        ([4], [300], slice(260, 560)),
        ([5, 6], [1, 2], slice(560, 563)),
    ]
    assert not list(chunks([0, 0], 256))


def test_shares_by_hand() -> None:
    def experts(counts: list[int], weights: int, threads: int) -> list[list[int]]:
        return [[e for c in share for e in c.experts] for share in shares_of(counts, weights, threads)]

    assert experts([8, 0, 8, 8, 8], 2**20, 2) == [[0, 2], [3, 4]]
    assert experts([8, 0, 8, 8, 8], 2**20, 9) == [[0], [2], [3], [4]]
    assert experts([8, 0, 8, 8, 8], 2**10, 2) == [[0, 2, 3, 4]]  # too little work
    assert experts([0, 30, 1], 2**20, 3) == [[1], [2]]
    assert experts([0, 0], 2**20, 2) == [[]]
