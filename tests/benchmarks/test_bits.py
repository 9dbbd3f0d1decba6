# The hashes of results on fixed inputs.

import torch

from benchmarks import bits


def test_a_line_for_each_case_and_a_hash_that_sees_one_bit(monkeypatch, capsys) -> None:
    monkeypatch.setattr(bits, "VOCABULARIES", (7,))
    for _ in range(2):
        bits.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:30] == lines[30:] and len(set(lines)) == 30
    p, above = torch.ones(2, requires_grad=True), torch.nextafter(torch.ones(2), torch.tensor(2.0))
    assert bits.digest(lambda: p * torch.ones(2), [p]) != bits.digest(lambda: p * above, [p])
