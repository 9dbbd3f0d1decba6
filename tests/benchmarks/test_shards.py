# The page of split vocabularies has the tables of its command, for the bytes that kernels write.

import runpy

import pytest

pytest.importorskip("triton")

from benchmarks import record
from fastkl.kernels import launch


def test_the_page_has_the_tables(capsys):
    model = runpy.run_module("benchmarks.shards", run_name="__main__")
    page = (record.ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in page, "run python -m benchmarks.shards"
    assert (model["STATE"], model["PART"]) == (4 * launch.STATE.value, 8 * launch.PART_VALUES)


def test_collectives_of_nccl():
    # Its formula by hand: LL over NVLink, LL128 over the network, a tree of LL.
    collective = runpy.run_module("benchmarks.shards")["collective"]
    assert collective(0, 8) == pytest.approx((6.6 + 7 * 0.6) * 1e-6)
    across = (14 + 14 * 1.9 + 4.0) * 1e-6 + 2e6 * 15 / 16 / (0.92 * 400e9)
    assert collective(2e6, 16) == pytest.approx(across)
    assert collective(0, 64, True) == pytest.approx((6.8 + 2 * (7 * 0.6 + 3 * 5.0)) * 1e-6)
