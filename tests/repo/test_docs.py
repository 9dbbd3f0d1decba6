"""The README is true: its code blocks run in order, its commands exist, its figures about memory
hold.
"""

from __future__ import annotations

import pathlib
import re
import subprocess

import pytest
import torch

import fastkl
from fastkl.tools import cli

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
WORDS = "\n".join(PAGES.values())


def blocks(language: str) -> list[str]:
    """The fenced code blocks of README and docs in one language."""
    return re.findall(rf"```{language}\n(.*?)```", WORDS, flags=re.S)


TARGETS = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.M)
COMMANDS = re.findall(r"\bfastkl (\w+)(?= |`|$)", "\n".join(blocks("sh")), flags=re.M)


def names() -> dict[str, object]:
    """Names that the README's lines find in a training step."""
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(2, 5, 64, generator=generator)
    hidden, ref_hidden = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    return {
        "hidden": hidden.requires_grad_(),
        "ref_hidden": ref_hidden,
        "lm_head": torch.nn.Linear(8, 64, bias=False),
        "ref_lm_head": torch.nn.Linear(8, 64, bias=False),
        "teacher_hidden": torch.randn(2, 5, 16, generator=generator),
        "teacher_weight": torch.randn(64, 16, generator=generator),
        "weights": torch.rand(2, 5, generator=generator),
        "policy_logits": policy.requires_grad_(),
        "ref_logits": policy.detach() + 0.1 * torch.randn(2, 5, 64, generator=generator),
        "tokens": torch.randint(64, (2, 5), generator=generator),
        "beta": 0.1,
        "mask": torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
        "micro_batches": [
            (
                torch.randn(1, n, 64, requires_grad=True),
                torch.randn(1, n, 64),
                torch.ones(1, n, dtype=torch.bool),
            )
            for n in (2, 5)
        ],
    }


def test_python_blocks_run_in_order() -> None:
    """The python blocks run one after the other; the one call gives what the user's lines give."""
    scope = names()
    found = blocks("python")
    exec(found[0], scope)
    loss = scope["loss"]
    near = {"rtol": 1e-3, "atol": 1e-6}
    for block in found[1:]:
        exec(block, scope)
        if "import KLPenalty" in block:
            torch.testing.assert_close(scope["loss"], loss, **near)
    assert scope["policy_logits"].grad is not None


def training_names() -> dict[str, object]:
    """Names that the rows of the table of fastkl.rl find in a training step."""
    generator = torch.Generator().manual_seed(0)
    scope = names() | {
        name: -torch.rand(2, 5, generator=generator)
        for name in ("logprob", "ref_logprob", "old_logprob", "kl")
    }
    scope |= {
        name: -torch.rand(2, generator=generator)
        for name in ("chosen", "rejected", "ref_chosen", "ref_rejected", "scores", "advantages")
    }
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    scope["logprob"].requires_grad_()
    scope["kl"] = scope["logprob"] * scope["ref_logprob"]
    scope |= {
        "optimizer": torch.optim.SGD([parameter], lr=0.1),
        "mean_kl": lambda: (parameter.detach() - 1).square().mean(),
        "fastkl": fastkl,
    }
    exec("from fastkl import *; from fastkl.rl import *", scope)
    return scope


def test_every_row_of_the_training_table_runs() -> None:
    """ "You use X, fastkl gives Y in one line": each line in the right column runs as it stands."""
    table = WORDS.split("| you use | fastkl gives |")[1].split("\n\n")[0]
    lines = [
        line
        for row in table.splitlines()[2:]
        for line in re.findall(r"`([^`]*\(.*?)`", row.split(" | ")[1])
    ]
    scope = training_names()
    for line in lines:
        assert eval(line, scope) is not None, line


def trainer_rows() -> list[tuple[str, str]]:
    """(module of fastkl.integrations, line) of every row of the table of trainers."""
    table = WORDS.split("| you train with | fastkl gives |")[1].split("\n\n")[0]
    return [re.search(r"\| `(\w+)\.([^`]*\))`", row).groups() for row in table.splitlines()[2:]]


@pytest.mark.parametrize("module, line", [row for row in trainer_rows() if row[0] != "verl"])
def test_every_row_of_the_table_of_trainers_runs(module: str, line: str, tmp_path) -> None:
    """As it stands, with tiny random models; two steps where it makes a trainer. Rows for verl run
    in tests/integrations/test_verl.py.
    """
    if module != "transformers":
        pytest.importorskip("trl")
    pytest.importorskip("transformers")
    from importlib import import_module

    scope = {"AdaptiveBeta": fastkl.rl.AdaptiveBeta, "KLMonitor": fastkl.rl.KLMonitor}
    if module != "transformers":
        import trl_cases

        scope |= trl_cases.readme_names(tmp_path)
    result = eval(line, scope | vars(import_module(f"fastkl.integrations.{module}")))
    if hasattr(result, "train"):
        result.train()
        assert result.state.global_step == 2


@pytest.mark.parametrize("target", sorted(set(TARGETS)))
def test_every_make_target_exists(target: str) -> None:
    run = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_every_command_exists(command: str) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])


LINKS = [
    (page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([\w/.-]+)\)", text)
]


@pytest.mark.parametrize("page, linked", LINKS, ids=lambda value: getattr(value, "stem", value))
def test_links_lead_somewhere(page: pathlib.Path, linked: str) -> None:
    """Relative links name files of the repository."""
    assert (page.parent / linked).exists()


def held_bytes(function, p: torch.Tensor, q: torch.Tensor) -> int:
    """Bytes that autograd holds for backward beyond the two inputs."""
    own = {p.untyped_storage().data_ptr(), q.untyped_storage().data_ptr()}
    storages: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        result = function(p, q)
    assert result.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_held_for_backward(dtype: torch.dtype) -> None:
    """12 bytes per logit pair for the user's lines, 40 bytes per token for fastkl."""
    p = torch.randn(8, 4096).to(dtype).requires_grad_()
    q = torch.randn(8, 4096).to(dtype)

    def lines(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
        log_p = p_logits.float().log_softmax(-1)
        log_q = q_logits.float().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    assert held_bytes(lines, p, q) == 12 * p.numel()
    assert held_bytes(fastkl.kl_divergence, p, q) == 40 * p.shape[0]
