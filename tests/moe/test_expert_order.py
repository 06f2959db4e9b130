"""Rows in order of expert, and sums of masses, by hand."""

from fractions import Fraction

import torch

from xmoe_fairseq.moe.expert_order import expert_order, of_rows
from xmoe_fairseq.moe.rules import rule_named


def test_rows_by_hand() -> None:
    """Expert 1 of four has no row; the last token, and for it ids that occur twice, count for nothing."""
    expert_TK = torch.tensor([[3, 0], [0, 2], [3, 1], [1, 1]])
    chosen_TK = torch.tensor([[True, True], [True, True], [True, False], [False, False]])
    rows = expert_order(expert_TK, chosen_TK, 4)
    assert rows.expert_R.tolist() == [0, 0, 2, 3, 3] and rows.counts_E.tolist() == [2, 0, 1, 2]
    assert rows.token_R.tolist() == [0, 1, 1, 0, 2] and rows.rank_R.tolist() == [1, 0, 1, 0, 0]
    weight_TE = torch.arange(16.0).view(4, 4)
    assert of_rows(weight_TE, rows.token_R, rows.expert_R).tolist() == [0, 4, 6, 3, 11]


def test_all_choices_are_the_same_rows() -> None:
    for tokens, limit in ((30, 3), (1, 1), (0, 2), (9, 5)):
        expert_TK = torch.rand(tokens, 5).argsort(dim=1)[:, :limit]
        known = expert_order(expert_TK, None, 5)
        masked = expert_order(expert_TK, torch.ones_like(expert_TK, dtype=torch.bool), 5)
        assert known.token_R.numel() == tokens * limit
        assert all(torch.equal(*pair) for pair in zip(known, masked, strict=True))


def test_a_mass_is_the_exact_sum_rounded_once() -> None:
    """Where float32 sums, of 600 probabilities, are off in their last digits."""
    p_TK = torch.softmax(torch.randn(20, 600) * 4, dim=1).sort(dim=1, descending=True).values
    p_TK = (p_TK / 2**-40).round() * 2**-40  # so that no mass lies between two numbers by less than a unit
    exact = [[float(sum(map(Fraction, p[:k]), Fraction())) for k in range(0, 600, 7)] for p in p_TK.tolist()]
    mass_TK = rule_named("mass").value(p_TK)
    assert torch.equal(mass_TK[:, ::7], torch.tensor(exact, dtype=torch.float64).float())
    sums_TK = torch.stack([p_TK[:, :k].flip(1).sum(dim=1) for k in range(0, 600, 7)], dim=1)
    assert not torch.equal(mass_TK[:, ::7], sums_TK)
