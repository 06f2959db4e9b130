"""How far two ways to compute the same floats may be apart, on any processor.

The order in which a processor adds, its fused multiply-adds and its `exp` are its own: nobody can say in
which number an error comes out, only how large it gets. A sum of n terms is off by about sqrt(n) eps of the
largest term, wherever the sum itself ends up: what is small by cancellation has the error of what cancelled.
So an error is measured against the largest number of a tensor, not against each number.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

# A few such sums follow one another. No processor that was tried has used more than half of what it gives.
MARGIN = 4
TERMS = 256  # of the sums in the tests' models and batches, at most


def tolerance(dtype: torch.dtype = torch.float32, terms: int = TERMS) -> float:
    """Relative to the largest number that takes part: 8e-6 in fp32 where nothing else is said."""
    return MARGIN * math.sqrt(terms) * torch.finfo(dtype).eps


def assert_same(
    got: Any,
    expected: Any,
    *,
    terms: int = TERMS,
    scale: float = 0.0,
    dtype: torch.dtype | None = None,
    what: str = "",
) -> None:
    """Tensors, numbers, or lists or dicts of them, are equal but for rounding; whole numbers are equal.

    scale: the largest number that took part, where it is not among those expected. What is together in a
    dict was computed together: there it is the root mean square of all at least (a gradient may be 0 by
    cancellation).
    dtype: in which it was computed, if not in that of the tensors.
    """
    if isinstance(expected, Mapping):
        assert got.keys() == expected.keys(), f"{what}: {got.keys() ^ expected.keys()}"
        scale = max(scale, _root_mean_square(expected.values()))
        for name, value in expected.items():
            assert_same(got[name], value, terms=terms, scale=scale, dtype=dtype, what=f"{what} {name}")
        return
    if isinstance(expected, Sequence):
        for number, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
            assert_same(mine, theirs, terms=terms, scale=scale, dtype=dtype, what=f"{what} {number}")
        return
    got, expected = (
        x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in (got, expected)
    )
    atol = 0.0
    if expected.is_floating_point():
        finite = expected.detach()[expected.isfinite()].double().abs()
        atol = tolerance(dtype or expected.dtype, terms) * max(
            [scale, *finite.flatten().tolist()], default=0.0
        )
    torch.testing.assert_close(got, expected, rtol=0, atol=atol, msg=lambda m: f"{what}: {m}")


def _root_mean_square(tensors: Any) -> float:
    floats = [
        t.detach().double().flatten() for t in tensors if isinstance(t, Tensor) and t.is_floating_point()
    ]
    return float(torch.cat(floats).square().mean().sqrt()) if floats else 0.0


def about(value: Any, *, terms: int = TERMS, scale: Any = 0.0, dtype: torch.dtype = torch.float32) -> Any:
    """Equals a number that was computed in this precision, but for rounding; scale as above."""
    value, scale = (float(torch.as_tensor(number).detach()) for number in (value, scale))
    return pytest.approx(value, rel=0, abs=tolerance(dtype, terms) * max(abs(scale), abs(value)))


def printed(value: Any, digits: int) -> Any:
    """Equals a number, or a dict of them, where one or both were rounded to so many digits for a log."""
    return pytest.approx(value, rel=tolerance(), abs=1.01 * 10.0**-digits)
