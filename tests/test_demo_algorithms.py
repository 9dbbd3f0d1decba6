"""The demo's algorithms in a tiny size: PPO, GRPO and DPO, through logits and from hidden states, with several updates and a trust region."""

import dataclasses
import json
import math

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

# After the skips: the demo needs its extra.
from demo_cases import TINY  # noqa: E402

from fastkl.rl import FixedBeta  # noqa: E402
from fastkl.tools.demo.algorithms import ALGORITHMS  # noqa: E402
from fastkl.tools.demo.checkpoints import save_checkpoint  # noqa: E402
from fastkl.tools.demo.corpus import build_corpus  # noqa: E402
from fastkl.tools.demo.finetuning import fine_tune  # noqa: E402
from fastkl.tools.demo.memory import allocations  # noqa: E402
from fastkl.tools.demo.model import LanguageModel  # noqa: E402
from fastkl.tools.demo.objective import Batch, Side, choose_beta  # noqa: E402
from fastkl.tools.demo.pretraining import start_from_bigrams  # noqa: E402
from fastkl.tools.demo.run import run_demo  # noqa: E402


@pytest.fixture(scope="module")
def tiny():
    """(reference, corpus) of TINY. The model is in float64, so that any difference between the two ways is one of formulas."""
    corpus = build_corpus(TINY)
    torch.manual_seed(0)
    reference = LanguageModel(corpus.vocabulary, TINY.width, TINY.layers, TINY.heads, TINY.context)
    start_from_bigrams(reference, corpus.train)
    return reference.double().requires_grad_(False), corpus


def tuned(tiny, beta=None, **changes):
    """One penalised run of TINY."""
    reference, corpus = tiny
    settings = dataclasses.replace(TINY, **changes)
    return fine_tune(reference, corpus, choose_beta(settings) if beta is None else beta, settings, "policy")


@pytest.mark.parametrize("changes", [{}, dict(epochs=2), dict(epochs=2, max_kl=1e-3)], ids=["one", "epochs", "max-kl"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_both_ways_give_the_same_curves(tiny, algorithm, changes):
    """Rounding is 1e-16 of a value here, and four steps cannot make it 1e-9; a gradient that lacks a term changes KL by more than 1e-4 of it."""
    direct, linear = (tuned(tiny, algorithm=algorithm, linear=way, **changes).series for way in (False, True))
    assert direct["kl"][0] == linear["kl"][0] == 0.0 and min(direct["kl"][1:]) > 0.0
    assert max(direct["reward"]) > 0.0
    for name, curve in direct.items():
        assert linear[name] == pytest.approx(curve, rel=1e-9), name


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_from_hidden_states_no_step_makes_logits(tiny, algorithm, linear):
    """The largest tensor of the whole run: smaller than the logits of one step; through logits it is not, so the measurement would see them."""
    logits = TINY.samples * TINY.response_length * tiny[1].vocabulary * 8
    assert (allocations(lambda: tuned(tiny, algorithm=algorithm, linear=linear, max_kl=1e-3))["largest"] < logits) == linear


def test_allocations_are_counted():
    """Two tensors of 4000 bytes at once, then one of 8000 alone."""
    def call():
        pair = torch.zeros(1000), torch.zeros(1000)
        del pair
        return torch.zeros(2000), torch.zeros(25)

    assert allocations(call) == {"peak": 8100, "largest": 8000}


def test_later_updates_count_their_ratios(tiny):
    """A second update on the same samples moves the policy further, by another loss than the first one's."""
    once, twice = (tuned(tiny, epochs=epochs).series["kl"] for epochs in (1, 2))
    assert twice[1] > 1.2 * once[1] > 0.0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_update_leaves_the_trust_region(tiny, algorithm):
    free = tuned(tiny, FixedBeta(0.0), algorithm=algorithm, max_kl=1.0).series
    assert free["step_fraction"] == [1.0] * TINY.steps
    limit = 0.5 * max(free["step_kl"])
    held = tuned(tiny, FixedBeta(0.0), algorithm=algorithm, max_kl=limit).series
    assert max(held["step_kl"]) <= limit and 0.0 < min(held["step_fraction"]) < 1.0


# ---- what the samples are worth


def batch_of(tiny):
    """A batch of TINY whose policy is not the reference, float64, with gradient to the policy's hidden states."""
    reference, corpus = tiny
    torch.manual_seed(1)
    shape = TINY.samples, TINY.response_length
    hidden, ref_hidden = (torch.randn(*shape, TINY.width, dtype=torch.float64) for _ in range(2))
    tokens = torch.randint(corpus.vocabulary, shape)
    return Batch(tokens, Side((ref_hidden + 0.1 * hidden).requires_grad_(), reference.head), Side(ref_hidden, reference.head))


def test_grpo_compares_within_a_group(tiny):
    rewards = torch.rand(TINY.samples, TINY.response_length, generator=torch.Generator().manual_seed(0))
    credit = ALGORITHMS["grpo"](FixedBeta(0.0), TINY).credit(rewards, None)
    sums = rewards.sum(-1)
    torch.testing.assert_close(credit, torch.cat([half - half.mean() for half in sums.split(4)]))


def test_dpo_draws_preferences_by_the_rewards():
    """4000 pairs that differ by 1, of either sign: preferred with probability sigmoid(1), to four standard deviations."""
    algorithm = ALGORITHMS["dpo"](FixedBeta(0.0), TINY)
    rewards = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 1.0]]).repeat(4000, 1)
    first = algorithm.credit(rewards, torch.Generator().manual_seed(0)).view(4000, 2).float().mean(0)
    expected = torch.tensor([1.0, -1.0]).sigmoid()
    assert ((first - expected).abs() < 4 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_dpo_without_a_penalty_is_the_limit_of_small_beta(tiny):
    batch, credit = batch_of(tiny), torch.rand(TINY.samples // 2, generator=torch.Generator().manual_seed(0)) < 0.5
    gradients = []
    for beta in (0.0, 1e-7):
        _, loss = ALGORITHMS["dpo"](FixedBeta(beta), TINY).loss(batch, credit, None)
        gradients.append(torch.autograd.grad(loss, batch.policy.hidden)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_beta_pulls_to_the_reference(tiny, algorithm):
    """With a large beta and no credit to speak of, a step along the loss's gradient lowers the KL."""
    batch = batch_of(tiny)
    made = ALGORITHMS[algorithm](FixedBeta(100.0), TINY)
    if algorithm == "dpo":
        # Of each pair the one that the reference prefers: its implicit reward is the lower one.
        stats = made.way.stats(batch)
        first, second = (stats.logprob - stats.ref_logprob).sum(-1).view(-1, 2).unbind(-1)
        credit = first < second
    else:
        credit = torch.zeros(TINY.samples)
    stats, loss = made.loss(batch, credit, None)
    gradient, = torch.autograd.grad(loss, batch.policy.hidden)
    moved = dataclasses.replace(batch, policy=Side(batch.policy.hidden - 1e-3 * gradient / gradient.abs().max(), batch.policy.head))
    if algorithm == "dpo":
        assert (made.way.stats(moved).logprob - stats.logprob).sum(-1).view(-1, 2).diff()[:, 0].mul(torch.where(credit, -1, 1)).gt(0).all()
    else:
        assert made.way.stats(moved).kl.mean() < stats.kl.mean()


# ---- reports and checkpoints


def test_report_with_a_trust_region(tmp_path, capsys):
    settings = dataclasses.replace(TINY, algorithm="grpo", max_kl=1e-4, epochs=2)
    assert run_demo(settings, tmp_path) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "policy: GRPO, 4 steps of 8 samples, 2 updates each, none further than 0.0001 nats per token" in words
    numbers = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    for series in numbers["series"].values():
        assert max(series["step_kl"]) <= 1e-4 and len(series["step_fraction"]) == TINY.steps
    assert "The trust region ends an update where it is 0.0001 nats per token from the policy before it: no penalty it shortened" in words
    assert math.isfinite(numbers["final"]["no penalty"]["kl"]) and not (tmp_path / "models").exists()


def test_checkpoints_are_the_models(tiny, tmp_path):
    """The logits that transformers makes of a checkpoint are the model's, with every parameter moved from where it starts; so are tokens and text."""
    transformers = pytest.importorskip("transformers")
    corpus, settings = tiny[1], dataclasses.replace(TINY, layers=2)
    torch.manual_seed(0)
    model = LanguageModel(corpus.vocabulary, settings.width, settings.layers, settings.heads, settings.context).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    save_checkpoint(model, corpus, settings, tmp_path / "checkpoint")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").eval()
    tokens = torch.randint(corpus.vocabulary, (3, settings.context))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model.head(model.hidden(tokens)), rtol=1e-5, atol=1e-5)
    tokenizer, text = transformers.AutoTokenizer.from_pretrained(tmp_path / "checkpoint"), "class A:\n    def f(self):\n        return 'é'\n"
    ids = corpus.tokenizer.encode(text).ids
    assert tokenizer(text).input_ids == ids and tokenizer.decode(ids) == text
    assert loaded.config.eos_token_id == tokenizer.eos_token_id == corpus.tokenizer.token_to_id("<|endoftext|>")
