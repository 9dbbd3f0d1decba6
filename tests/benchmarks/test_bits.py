"""The hashes of results on fixed inputs."""

from __future__ import annotations

import torch

from benchmarks import bits
from fastkl import reference


def test_a_line_for_each_case_and_a_hash_that_sees_one_bit(monkeypatch, capsys) -> None:
    """The same lines again; another line where a result or a gradient differs in its last bit."""
    monkeypatch.setattr(bits, "VOCABULARIES", (7,))
    bits.main()
    first = capsys.readouterr().out.splitlines()
    bits.main()
    assert (
        capsys.readouterr().out.splitlines() == first and len(first) == 30 and len(set(first)) == 30
    )
    p, q = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5)
    off = torch.nextafter(torch.ones(2), torch.tensor(2.0))

    def kl(factor):
        return bits.digest(lambda: [reference.row_statistics(p, q).kl * factor], [p])

    assert kl(torch.ones(2)) != kl(off)
