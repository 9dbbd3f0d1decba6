# Wrong use of the commands is found before a GPU is looked for or anything is compiled.

from importlib import import_module

import pytest
import torch

pytest.importorskip("triton")

SPEED = "--provider json:nothing,--provider no.such.module:x,--seconds -5,--seconds 0"
SPEED += f",--seconds nan,--seconds inf,--out /proc/x,--out {__file__},--out {'x' * 300}"


@pytest.mark.parametrize(
    ("tool", "words", "wrong"),
    [
        *(("speed", words, f"{words.split()[0]}: expected") for words in SPEED.split(",")),
        ("speed", "", "--out: expected"),
        ("speed", "--suite nothing", "--suite: invalid choice"),
        ("speed", "--providers torch nobody", "--providers: invalid choice"),
        ("accuracy", "--rows 0", "--rows: expected"),
        ("accuracy", "--vocabulary 1", "--vocabulary: expected"),
        ("accuracy", "--providers nobody", "--providers: invalid choice"),
        ("accuracy", "--wrt r", "--wrt: invalid choice"),
        ("accuracy", "--plot /proc/x.png", "--plot: expected"),
        ("static_costs", "--write-baseline x.json --arch sm_90", "--write-baseline: expected"),
        ("static_costs", "--write-baseline x.json --kernel forward", "--write-baseline: expected"),
        ("static_costs", "--baseline nowhere.json", "--baseline: expected"),
        ("tune", "--direction=fused --dtype=bf16 --vocabulary=50257", "--vocabulary: expected"),
    ],
)
def test_wrong_use(tool, words, wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        import_module(f"benchmarks.{tool}").main(words.split())
    assert wrong in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tool", "words"), [("speed", "--out {}"), ("tune", "--direction=forward --dtype=bf16")]
)
def test_without_a_gpu_nothing_is_measured(tool, words, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert import_module(f"benchmarks.{tool}").main(words.format(tmp_path).split()) == 2
    assert "expected a CUDA GPU, got none" in capsys.readouterr().err and not [*tmp_path.iterdir()]
