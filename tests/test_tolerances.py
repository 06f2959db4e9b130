"""The tolerances let rounding pass, and nothing a thousandth large."""

import pytest
import torch
from tolerances import about, assert_same, printed, tolerance


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_fault_of_a_thousandth_is_found_and_rounding_is_not(scale: float) -> None:
    exact = torch.randn(64, 64, dtype=torch.float64) @ torch.randn(64, 64, dtype=torch.float64) * scale
    expected = exact.float()
    assert_same(expected * (1 + torch.finfo(torch.float32).eps), expected)
    for value in (1.001 * expected, 1.001 * expected.max()):
        with pytest.raises(AssertionError, match="gradient"):
            assert_same(value, expected.expand_as(value) if value.ndim else expected.max(), what="gradient")
    assert about(scale) == scale * (1 + 1e-6)
    assert about(scale) != 1.001 * scale
    assert about(1.0, scale=scale) == 1.0


def test_what_cancelled_sets_the_error_of_what_is_left() -> None:
    weight, bias = torch.randn(100), torch.zeros(3)
    got = {"weight": weight, "bias": bias + 1e-7}
    assert_same(got, {"weight": weight, "bias": bias})
    for wrong in ({"weight": weight, "bias": bias + 1e-3}, {"weight": 1.001 * weight, "bias": bias}):
        with pytest.raises(AssertionError, match="weight|bias"):
            assert_same(wrong, {"weight": weight, "bias": bias})
    with pytest.raises(AssertionError, match="bias"):
        assert_same({"weight": weight}, {"weight": weight, "bias": bias})


def test_special_values_and_whole_numbers_are_equal() -> None:
    assert_same([torch.tensor([1.0, float("inf")]), 3], [torch.tensor([1.0, float("inf")]), 3])
    for got, expected in ((float("nan"), 1.0), (1.0, float("inf")), (torch.tensor(3), torch.tensor(4))):
        with pytest.raises(AssertionError):
            assert_same(got, expected)


def test_precision_and_number_of_terms() -> None:
    assert tolerance(torch.bfloat16, terms=1) == 2.0**-5
    assert tolerance(torch.float64) < 1e-13 < tolerance() < 1e-5
    assert tolerance(terms=400) == 20 * tolerance(terms=1)


def test_a_printed_number_may_be_one_digit_off() -> None:
    assert printed(1.2345, 4) == 1.2346
    assert printed({"loss": 1.2345}, 4) != {"loss": 1.2347}
