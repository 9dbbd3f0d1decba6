"""Tokens that were suppressed in one model or both: what they hold says nothing about the others,
and costs them nothing.
"""

from __future__ import annotations

import pytest
from test_divergence import check

from fastkl import testing


@pytest.mark.parametrize(
    "places", [(0,), (250, 501, 752)], ids=["the first", "where the kernels look for a constant"]
)
def test_suppressed_entries_cost_no_digits(implementation, places) -> None:
    """Entries without probability whose logits differ by hundreds and thousands, beside small
    differences everywhere else.
    """
    p, q = testing.pair("normal3", 4, 1003, 1e-3)
    for row, apart in enumerate((-100.0, -300.0, -3000.0, 40.0)):
        for place in places:
            p[row, place], q[row, place] = -1000.0, -1000.0 + apart
    check(implementation, p, q)
    check(implementation, p, q + 50.0)
