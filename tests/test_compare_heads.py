"""`fastkl compare` without transformers: from hidden states to values, and heads that are not the model's own."""

import math
from types import SimpleNamespace

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("tqdm")

import fastkl  # noqa: E402
from fastkl.tools.compare import loading, measure, store  # noqa: E402
from fastkl.tools.compare.settings import CompareError  # noqa: E402

COLUMNS = [name for name in store.VALUES.names if name != "scored"]


def test_16_bit_models_have_float32_logits():
    """As linear_token_stats(logits_dtype=torch.float32): each logit of 16-bit hidden states is not rounded to 16 bits."""
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(50, 24, generator=generator).bfloat16() for _ in range(2)]
    heads = [loading.Head(torch.randn(400, 24, generator=generator).bfloat16(), torch.randn(400, generator=generator).bfloat16()) for _ in range(2)]
    tokens = torch.randint(390, (50,), generator=generator)
    values = measure.token_values(heads[0], hidden[0], heads[1], hidden[1], tokens, 390)
    stats = fastkl.linear_token_stats(hidden[0], heads[0].weight[:390], tokens, hidden[1], heads[1].weight[:390], bias=heads[0].bias[:390],
                                      ref_bias=heads[1].bias[:390], logits_dtype=torch.float32)
    for name, expected in zip(("logprob_a", "entropy_a", "logprob_b", "kl_ab", "kl_ba"), stats, strict=True):
        np.testing.assert_allclose(values[name], expected, rtol=1e-5, atol=1e-5)
    p, q = (torch.nn.functional.linear(each.double(), head.weight.double(), head.bias.double())[:, :390].log_softmax(-1)
            for each, head in zip(hidden, heads, strict=True))
    np.testing.assert_allclose(values["kl_ab"], (p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=1e-5)


def test_blocks_change_nothing_but_rounding(monkeypatch):
    hidden, head = torch.randn(30, 16), loading.Head(torch.randn(100, 16), None)
    tokens = torch.randint(100, (30,))
    whole = measure.token_values(head, hidden, head, hidden * 1.1, tokens, 100)
    monkeypatch.setattr(measure, "BLOCK_LOGITS", {"cpu": 700, "cuda": 700})
    monkeypatch.setattr(loading, "WIDENED", 16 * 7)
    parts = measure.token_values(head, hidden, head, hidden * 1.1, tokens, 100)
    for name in COLUMNS:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5, atol=1e-6)


def test_entries_that_a_model_forbids():
    """-inf in both logits adds nothing; in B's alone, the KL is infinite and the JSD is not."""
    p, q = torch.randn(2, 9, 12).unbind(0)
    p[:, :2] = q[:, :2] = -math.inf
    q[4:, 3] = -math.inf
    values = measure.block_values(p, q, torch.full((9,), 5))
    assert np.isfinite(values["kl_ab"][:4]).all() and np.isinf(values["kl_ab"][4:]).all() and np.isfinite(values["jsd"]).all()
    log_p, log_q = (logits.double().log_softmax(-1)[:, 2:] for logits in (p, q))
    mixture = torch.log((log_p.exp() + log_q.exp()) / 2)
    jsd = sum((log.exp() * (log - mixture)).nan_to_num(0.0).sum(-1) for log in (log_p, log_q)) / 2
    np.testing.assert_allclose(values["jsd"], jsd, atol=1e-6)


def test_a_block_is_one_copy_and_only_the_jsd_makes_log_softmax(monkeypatch):
    counts = {"cpu": 0, "log_softmax": 0}

    def count(name, own):
        def counted(self, *arguments):
            counts[name] += 1
            return own(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)

    for name in counts:
        count(name, getattr(torch.Tensor, name))
    logits = torch.randn(2, 5, 40)
    values = measure.block_values(*logits, torch.arange(5))
    assert counts == {"cpu": 1, "log_softmax": 2}
    assert values["top_a"].tolist() == logits[0].argmax(-1).tolist() and values["top_b"].tolist() == logits[1].argmax(-1).tolist()
    for letter, expected in zip("ab", logits.double().log_softmax(-1).amax(-1), strict=True):
        np.testing.assert_allclose(values[f"top_logprob_{letter}"], expected, rtol=1e-6)


def test_jsd_keeps_its_digits_where_it_is_small():
    p = torch.randn(20, 50)
    q = p + 1e-3 * torch.randn(20, 50)
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (p, q))
    mixture = torch.log((log_p.exp() + log_q.exp()) / 2)
    jsd = sum((log.exp() * (log - mixture)).sum(-1) for log in (log_p, log_q)) / 2
    assert jsd.max() < 1e-6
    np.testing.assert_allclose(measure.block_values(p, q, torch.zeros(20, dtype=torch.long))["jsd"], jsd, rtol=2e-3)


class Odd(torch.nn.Module):
    """Looks like a model of transformers; its logits are the head's with what `change` does to them, its hidden states what `mix` makes."""

    def __init__(self, change=None, mix=None):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20)
        self.change, self.mix = change or (lambda logits: logits), mix or (lambda hidden: hidden)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

    def get_output_embeddings(self):
        return self.head

    def base_model(self, input_ids, use_cache):
        return SimpleNamespace(last_hidden_state=self.mix(self.embed(input_ids)))

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.change(self.head(self.base_model(input_ids, use_cache).last_hidden_state)))


@pytest.mark.parametrize("change, mix, expected", [
    (None, None, None),
    (lambda logits: logits * 1.01, None, "got logits off by"),
    (lambda logits: logits + torch.arange(20) / 20, None, "got logits off by"),
    (lambda logits: logits[..., :15], None, "got 15 logits beside an lm_head of 20 rows"),
    (lambda logits: logits * math.nan, None, "expected finite logits"),
    (None, lambda hidden: hidden + hidden.mean(1, keepdim=True), "logits depend on tokens that follow"),
])
@torch.no_grad()
def test_a_head_that_is_not_the_models_own_is_refused(change, mix, expected):
    torch.manual_seed(0)
    model = loading.Model("MODEL_A", "odd", Odd(change, mix), "cpu")
    if expected is None:
        model.check(torch.arange(10))
    else:
        with pytest.raises(CompareError, match=expected):
            model.check(torch.arange(10))


@pytest.mark.parametrize("multiplies", [True, False])
@torch.no_grad()
def test_the_best_scale_is_taken_and_not_the_first_that_fits(multiplies):
    """In bfloat16 either reading of a scale near 1 is within rounding of the other."""
    torch.manual_seed(0)
    odd = Odd(lambda logits: logits * 1.01 if multiplies else logits / 1.01).bfloat16()
    odd.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(logits_scaling=1.01))
    model = loading.Model("MODEL_A", "odd", odd, "cpu")
    model.check(torch.arange(20))
    assert model.head.scale == (1.01 if multiplies else 1 / 1.01) and model.head.cap is None


def test_a_model_without_a_head_is_refused():
    odd = Odd()
    odd.head = None
    with pytest.raises(CompareError, match="without an lm_head"):
        loading.Model("MODEL_B", "odd", odd, "cpu")
