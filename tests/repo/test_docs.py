# README and docs are true: their code blocks run in order, their commands exist, a figure of memory
# holds, and the reference has every public name.

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import call_sites
import memory
import pytest
import torch
import torch.distributed as dist
import verl_stand_in

import fastkl
from fastkl.integrations.verl import FSDP_LOSSES
from fastkl.tools import cli

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = {
    path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
}
TRAINER_PAGES = [path for path in PAGES if path.parent.name == "trainers"]
WORDS = "\n".join(PAGES.values())


def blocks(language: str, words: str = WORDS) -> list[str]:
    # The fenced code blocks of README and docs in one language.
    return re.findall(rf"```{language}\n(.*?)```", words, flags=re.S)


def names() -> dict[str, object]:
    # Names that the README's lines find in a training step.
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(2, 5, 64, generator=generator)
    return call_sites.names() | {
        "hidden": torch.randn(2, 5, 8, generator=generator, requires_grad=True),
        "ref_hidden": torch.randn(2, 5, 8, generator=generator),
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


@pytest.fixture
def group(request) -> dist.ProcessGroup:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    request.addfinalizer(dist.destroy_process_group)
    return dist.group.WORLD


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks("python", PAGES[page]) and page not in TRAINER_PAGES],
    ids=lambda page: page.stem,
)
def test_python_blocks_run_in_order(page, group, tmp_path, monkeypatch) -> None:
    # Page by page, the python blocks run one after the other. In the README the one call gives what
    # the user's lines give.
    monkeypatch.chdir(tmp_path)
    if "Qwen/" in PAGES[page]:
        pytest.importorskip("trl")
        import_module("trl_cases").link_models(tmp_path)
    scope, losses = names() | {"group": group, "dp_cp_group": group}, []
    for block in blocks("python", PAGES[page]):
        for module in re.findall(r"^(?:from|import) (\w+)", block, flags=re.M):
            pytest.importorskip(module)
        exec(block, scope)
        losses.append(scope.get("loss"))
    if page.stem == "README":
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-6)
        assert scope["policy_logits"].grad is not None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", TRAINER_PAGES, ids=lambda page: page.stem)
def test_the_pages_of_trainers_run(page, request, monkeypatch, tmp_path) -> None:
    # In a folder where the models that they name are tiny random ones; without verl, a stand-in.
    monkeypatch.chdir(tmp_path)
    scope = names() | call_sites.names() | {"__name__": page.stem}
    if page.stem == "megatron":
        scope["group"] = request.getfixturevalue("group")
    if page.stem in ("trl", "transformers"):
        pytest.importorskip("trl")
        import_module("trl_cases").link_models(tmp_path)
    if page.stem == "verl" and not find_spec("verl"):
        stand_in = {**verl_stand_in.stand_in(), FSDP_LOSSES: verl_stand_in.fsdp_losses()}
        for name, module in stand_in.items():
            monkeypatch.setitem(sys.modules, name, module)
    for block in blocks("python", PAGES[page]):
        exec(block, scope)
        if "trainer.train()" in block:
            assert scope["trainer"].state.global_step == scope["args"].max_steps


def training_names() -> dict[str, object]:
    # Names that the rows of the table of fastkl.rl find in a training step.
    per_token = ("logprob", "ref_logprob", "old_logprob")
    per_response = ("chosen", "rejected", "ref_chosen", "ref_rejected", "scores", "advantages")
    scope = names() | {name: -torch.rand(2, 5) for name in per_token}
    scope |= {name: -torch.rand(2) for name in per_response}
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    scope |= {
        "kl": scope["logprob"].requires_grad_() * scope["ref_logprob"],
        "optimizer": torch.optim.SGD([parameter], lr=0.1),
        "mean_kl": lambda: (parameter.detach() - 1).square().mean(),
    }
    exec("import fastkl; from fastkl import *; from fastkl.rl import *", scope)
    scope["controller"] = fastkl.rl.AdaptiveBeta(0.05, target=0.1, horizon=1000)
    scope["penalty"] = fastkl.KLPenalty(scope["controller"])
    scope["penalty"](scope["policy_logits"], scope["ref_logits"], scope["mask"])
    return scope


def table(heading: str) -> list[str]:
    # List the right columns of a table of README and docs, row by row.
    rows = WORDS.split(heading)[1].split("\n\n")[0].splitlines()[2:]
    return [row.split(" | ")[1] for row in rows]


def test_every_row_of_the_training_table_runs() -> None:
    # "You use X, fastkl gives Y in one line": each line in the right column runs as it stands.
    scope, rows = training_names(), "\n".join(table("| you use | fastkl gives |"))
    for line in re.findall(r"`([^`\n]*\(.*?)`", rows):
        assert eval(line, scope) is not None, line


TRAINERS = [
    re.search(r"`(\w+)\.([^`]*\))`", row).groups()
    for row in table("| you train with | fastkl gives |")
]


@pytest.mark.parametrize("module, line", [row for row in TRAINERS if row[0] != "verl"])
def test_every_row_of_the_table_of_trainers_runs(module: str, line: str) -> None:
    # As it stands, with tiny random models; two steps where it makes a trainer. Rows for verl run
    # in tests/integrations/test_verl.py.
    pytest.importorskip("transformers" if module == "transformers" else "trl")
    scope = {"AdaptiveBeta": fastkl.rl.AdaptiveBeta, "KLMonitor": fastkl.rl.KLMonitor}
    if module != "transformers":
        scope |= import_module("trl_cases").readme_names()
    result = eval(line, scope | vars(import_module(f"fastkl.integrations.{module}")))
    if hasattr(result, "train"):
        result.train()
        assert result.state.global_step == 2


def test_every_command_exists() -> None:
    shell = "\n".join(blocks("sh"))
    targets = set(re.findall(r"^make (\w+)", shell, flags=re.M))
    subprocess.run(["make", "-n", *targets], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    for command in set(re.findall(r"\bfastkl (\w+)(?= |`|$)", shell, flags=re.M)):
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])


def test_links_lead_somewhere() -> None:
    # Relative links name files of the repository; `make docs` checks anchors too.
    links = [
        (page, x) for page, text in PAGES.items() for x in re.findall(r"\]\(([\w/.-]+)[)#]", text)
    ]
    assert not [(page, x) for page, x in links if not (page.parent / x).exists()]


def public_names() -> set[str]:
    # Names that users may import; a module without __all__ exports its names without an underscore.
    names = {f"fastkl.{name}" for name in fastkl.__all__ if name != "rl"}
    names |= {f"fastkl.rl.{name}" for name in fastkl.rl.__all__}
    for path in (ROOT / "fastkl" / "testing.py", *ROOT.glob("fastkl/integrations/[!_]*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        names |= {
            f"{module}.{node.name}"
            for node in ast.parse(path.read_text()).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"
        }
    names |= {f"fastkl.tools.compare.{name}" for name in ("Comparison", "compare_models")}
    return names | {"fastkl.integrations.transformers.head_of"}


def test_the_reference_has_every_public_name_once() -> None:
    shown = re.findall(r"^::: (\S+)$", WORDS, flags=re.M)
    missing = public_names() - set(shown)
    assert not missing, f"in no page of docs/reference: add ::: {missing}"
    assert sorted(shown) == sorted(public_names())


def test_bytes_held_for_backward() -> None:
    # 40 bytes per token, beside the logits.
    pair = torch.randn(2, 8, 4096, requires_grad=True)
    held = memory.saved(lambda: fastkl.kl_divergence(pair[0], pair[1].detach()))
    assert sum(held.values()) - pair.untyped_storage().nbytes() == 40 * 8
