"Checks at the public boundary: one ValueError that names the argument, whatever comes."
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nncomp.core import check_fraction, check_int


@given(st.floats(0, 1))
def test_fractions_come_back_as_floats(value):
    for same in (value, np.float64(value), torch.tensor(value, dtype=torch.double), np.array(value)):
        found = check_fraction(same)
        assert type(found) is float and found == value


@pytest.mark.parametrize("value, expected", [
    (0, 0.0), (1, 1.0), (True, 1.0), (np.int64(1), 1.0), (Fraction(1, 4), 0.25), (Decimal("0.5"), 0.5),
])
def test_any_single_number_is_a_fraction(value, expected):
    assert check_fraction(value) == expected


@pytest.mark.parametrize("value", [
    50, -1e-9, 1.0000001, float("nan"), float("inf"), "0.5", "half", b"0.5", None, [0.5], {}, object(), 1j,
    torch.tensor([0.2, 0.3]), torch.zeros(0), np.zeros(3), torch.tensor(2.0), torch.tensor(1j), lambda: 0.5,
])
def test_all_else_is_one_error_with_the_name(value):
    with pytest.raises(ValueError, match=r"floor must lie in \[0, 1\], got ") as error:
        check_fraction(value, "floor")
    assert len(str(error.value)) < 120


@pytest.mark.parametrize("value", ["3", 3.0, None, True, torch.tensor(3), [3]])
def test_what_is_no_integer_is_named(value):
    with pytest.raises(ValueError, match="k must be an integer of at least 1, got"):
        check_int(value, 1, name="k")
