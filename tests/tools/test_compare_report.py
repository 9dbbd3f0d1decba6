"""`fastkl compare` without transformers: windows, figures on disk, the terminal and the page."""

import html.parser
import math
import random
import re

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("tqdm")

from fastkl.rl import KLMonitor  # noqa: E402
from fastkl.tools.compare import measure, report  # noqa: E402

NASTY = (
    "naïve 日本語 <script>alert(\"1\")</script> & \x1b[31m\x07 \u202e'x'\n\nline\ttwo </div>\n  end"
)
SECOND = "second file\n" * 4
TOPS = ("top_a", "top_b")


@pytest.fixture
def filled():
    """Two documents, a character a token, with random values; their first tokens have none."""
    made, generator = measure.Store(), np.random.default_rng(0)
    for name, content in (("a & <b>.txt", NASTY), ("b.txt", SECOND)):
        numbers = range(len(content))
        lines = [1 + content[:at].count("\n") for at in numbers]
        made.add(name, 1, numbers, lines, list(content))
    made.seal()
    made.tokens["scored"] = 1
    made.tokens["scored"][[0, len(NASTY)]] = 0
    for name in measure.VALUES:
        sign, count = -1 if "logprob" in name else 1, len(made.tokens)
        column = sign * generator.exponential(size=count).round(1)
        made.tokens[name] = generator.integers(3, size=count) if name in TOPS else column
        made.tokens[name] *= made.tokens["scored"]
    return made


def make_report(made, by="document"):
    model = {"name": "mo<d>el", "class": "Llama", "dtype": "float32", "vocabulary": 64}
    models = [{**model, "adapter": None}, {**model, "adapter": {"kind": "LORA", "base": "x\x1b"}}]
    text = {"files": ["a & <b>.txt", "b.txt"], "skipped": [], "documents": 2, "not_scored": 2}
    text |= {"tokenizer": None, "vocabulary": 60, "context": 32, "overlap": 8}
    many = [{"id": at, "token": f"<{at}>"} for at in range(1500)]
    result = {"models": models, "text": {**text, "left_out": {"A": [], "B": many}}}
    result |= {"by": by, "shown": 50, "summary": measure.summarise(made)}
    result["units"] = measure.worst_units(made, by, 50)
    result["top"] = measure.worst_tokens(made, 50, "<{}>".format)
    return {**result, "sentence": report.sentence(result)}


@pytest.mark.parametrize("count", [1, 2, 6, 8, 1000])
def test_quantiles_are_exact(count):
    """Quantiles of torch.quantile and of KLMonitor: one definition everywhere."""
    special = [0.0, -0.0, 1e-45, 1e-38, math.inf]  # a zero with a sign is a zero
    column = [*np.random.default_rng(count).exponential(size=count) ** 8, *special][-count:]
    column = np.array(column, np.float32)
    found, values = measure.quantiles(column), torch.from_numpy(column).abs()
    fractions = torch.tensor([0.5, 0.95, 0.99, 1.0], dtype=torch.float64)
    expected = torch.quantile(values.double(), fractions).nan_to_num(math.inf, math.inf)
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-12, atol=0)
    monitored = KLMonitor().update(values)
    assert all(repr(found[name]) == repr(monitored[f"kl/{name}"]) for name in ("p50", "p95", "p99"))


@pytest.mark.parametrize("seed", range(10))
def test_every_token_is_scored_once_with_its_context(seed):
    generator = random.Random(seed)
    start, context = generator.randrange(50), generator.randrange(8, 40)
    overlap, first = generator.randrange(context), start + generator.choice([1, 2])
    document = measure.Document("x", start, first, start + generator.randrange(3, 200))
    windows, scored = list(measure.windows(document, context, overlap)), range(first, document.end)
    assert [at for _, low, high in windows for at in range(low, high)] == list(scored)
    for low, first, last in windows:
        assert 0 < last - 1 - low <= context and low >= start  # what the models read
        assert first - low >= min(overlap + 1, first - start)


@pytest.mark.parametrize("by", ["document", "line"])
def test_units_and_tokens_are_the_worst(filled, by):
    content, tokens = NASTY + SECOND, filled.tokens
    units = measure.worst_units(filled, by, 100)
    assert len(units) == (2 if by == "document" else 4 + 4)  # the empty line has its newline
    for unit in units:
        rows = tokens[unit["index"] : unit["index"] + unit["tokens"]]
        assert unit["kl_ab"] == pytest.approx(rows["kl_ab"].mean(dtype=np.float64), rel=1e-12)
        assert unit["max_kl_ab"] == rows["kl_ab"].max() and (rows["scored"] == 1).all()
        assert unit["same_top1"] == pytest.approx((rows["top_a"] == rows["top_b"]).mean())
        assert by == "document" or set(rows["line"]) == {unit["line"]}
    kl = np.where(tokens["scored"], tokens["kl_ab"], -1)
    worst = measure.worst_tokens(filled, 9, "<{}>".format)
    assert [entry["index"] for entry in worst] == np.argsort(-kl, kind="stable")[:9].tolist()
    for entry in worst:
        row = tokens[entry["index"]]
        assert entry["token"] == content[entry["index"]] and entry["kl_ba"] == row["kl_ba"]
        assert entry["before"] + entry["token"] + entry["after"] in content
        expected = {"token": f"<{row['top_b']}>", "probability": math.exp(row["top_logprob_b"])}
        assert entry["expected_b"] == expected


@pytest.mark.parametrize("width", [60, 120])
def test_a_terminal_shows_all_figures_and_obeys_no_text(filled, width):
    content = make_report(filled)
    shown = report.text_report(content, width)
    assert shown == re.sub("\x1b\\[[70]m", "", report.text_report(content, width, color=True))
    assert all(character.isprintable() or character == "\n" for character in shown)
    for values in (content["summary"][name] for name in measure.DIVERGENCES):
        assert all(f"{value:.4g}" in shown for value in values.values())
    assert all(f"{unit['kl_ab']:.4g}" in shown for unit in content["units"])
    tokens = shown.partition("tokens by KL")[2].splitlines()
    assert max(map(len, tokens[1:])) <= width


@pytest.mark.parametrize("by", ["document", "line"])
def test_a_page_is_well_formed_and_holds_the_text(filled, by):
    opened, texts, ids, links, levels, values = [], [], set(), set(), [], []

    class Page(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            attrs = dict(attrs)
            ids.add(attrs.get("id"))
            links.add(attrs.get("href", "#")[1:])
            if "data-v" in attrs:
                values.append(attrs["data-v"].split()[0])
                levels.append(int(attrs["class"].split()[0][1:]))
            if tag != "meta":
                opened.append((tag, attrs.get("class")))

        def handle_endtag(self, tag):
            assert opened.pop()[0] == tag

        def handle_data(self, data):
            if ("div", "text") in opened:
                texts.append(data)

    content = make_report(filled, by)
    written = "".join(report.page(content, filled, "<{}>".format))
    Page().feed(written)
    assert opened == [] and written.count("<script") == written.count("<style") == 1
    assert "".join(texts) == NASTY.replace("\x1b", "␛").replace("\x07", "␇") + SECOND
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]|https?:| src=", written)
    kl = filled.tokens["kl_ab"][filled.tokens["scored"] > 0].tolist()
    assert values == [f"{value:.3g}" for value in kl]
    order = np.argsort(kl, kind="stable")
    assert (np.diff(np.array(levels)[order]) >= 0).all() and {*levels} >= {0, 8}
    assert links - {""} <= ids and len(links) > 5


@pytest.mark.parametrize("count, dtype", [(1, "float32"), (7, "bfloat16")])
def test_same_models_are_called_the_same(count, dtype):
    models = [{"adapter": None, "dtype": dtype}, {"adapter": {}, "dtype": dtype}]
    models[1]["adapter"] = {"kind": "LORA"}
    zero = {"max": 0.0, "p50": 0.0}
    content = {"summary": {"tokens": count, "kl_ab": zero, "kl_ba": zero}, "top": []}
    text = report.sentence({**content, "models": models})
    assert text.startswith("A and B are the same") and ("--dtype" in text) == (dtype != "float32")
    assert report.bounds_of(content["summary"]) == []
