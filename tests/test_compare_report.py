"""`fastkl compare` without transformers: from hidden states to values, what lies on disk, how a text is cut, the terminal and the page."""

import html.parser
import math
import random
import re

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("tqdm")

from fastkl.rl import KLMonitor  # noqa: E402
from fastkl.tools import cli  # noqa: E402
from fastkl.tools.compare import html as page  # noqa: E402
from fastkl.tools.compare import inputs, report, store, summary, text  # noqa: E402
from fastkl.tools.compare.settings import CompareError  # noqa: E402

NASTY = 'naïve 日本語 <script>alert("1")</script> & \x1b[31m\x07 \u202e\'x\'\n\nline\ttwo </div>\n  end'
COLUMNS = [name for name in store.VALUES.names if name != "scored"]
FLOATS = [name for name in store.VALUES.names if store.VALUES[name].kind == "f"]


def characters(index):
    return f"<{index}>"


@pytest.fixture
def filled(monkeypatch):
    """Two documents, a character a token, with random values; their first tokens have none. In blocks of 7 tokens."""
    monkeypatch.setattr(store, "BLOCK", 7)
    made, generator = store.Store(), np.random.default_rng(0)
    for name, content in (("a & <b>.txt", NASTY), ("b.txt", "second file\n" * 4)):
        start = made.count
        lines = 1 + np.cumsum([0] + [character == "\n" for character in content[:-1]])
        made.append(range(len(content)), lines, [character.encode() for character in content])
        made.documents.append(store.Document(name, start, start + 1, made.count))
        values = np.zeros(len(content) - 1, store.VALUES)
        for column in FLOATS:
            values[column] = generator.exponential(size=len(values)).round(1) * (-1 if column.startswith(("logprob", "top")) else 1)
        values["scored"], values["top_a"], values["top_b"] = 1, generator.integers(3, size=len(values)), generator.integers(3, size=len(values))
        made.write(start + 1, values)
    yield made
    made.close()


def all_values(made):
    values = made.values(0, made.count)
    return values[values["scored"] > 0]


def make_report(made, by="document", shown=5):
    figures, top = summary.summarise(made), [summary.token_entry(made, at, characters) for at in summary.worst_tokens(made, shown)]
    units = [unit.entry(made) for unit in summary.worst_units(made, by, shown)]
    about = {"name": "mo<d>el", "class": "Llama", "dtype": "float32", "vocabulary": 64, "adapter": None}
    return {"sentence": report.sentence(figures, units, top, by), "models": [about, {**about, "vocabulary": 70}], "by": by, "shown": shown,
            "text": {"files": ["a & <b>.txt", "b.txt"], "skipped": [], "documents": 2, "not_scored": 2, "tokenizer": None, "vocabulary": 64,
                     "left_out": {"A": [], "B": []}, "context": 32, "overlap": 8},
            "summary": figures, "units": units, "top": top}


# ---- on disk


@pytest.mark.parametrize("count", [1, 2, 6, 7, 8, 100, 1000])
def test_quantiles_are_exact(monkeypatch, count):
    monkeypatch.setattr(store, "BLOCK", 64)
    generator = np.random.default_rng(count)
    column = np.concatenate([generator.exponential(size=count) ** 8, [0.0, 0.0, 1e-45, 1e-38, math.inf]])[-count:].astype(np.float32)
    column[5::5] = -0.0  # a zero with a sign is a zero
    made, values = store.Store(), np.zeros(count, store.VALUES)
    made.append([0] * count, [1] * count, [b"x"] * count)
    values["kl_ab"], values["scored"] = column, 1
    made.write(0, values)
    fractions = [0.0, 0.01, 0.5, 0.95, 0.99, 1.0]
    expected = torch.quantile(torch.from_numpy(column).abs().double(), torch.tensor(fractions, dtype=torch.float64)).nan_to_num(math.inf, math.inf)
    np.testing.assert_allclose(made.quantiles("kl_ab", fractions), expected, rtol=1e-12, atol=0)
    monitored = KLMonitor().update(torch.from_numpy(column).abs())  # one definition everywhere
    assert repr(made.quantiles("kl_ab", [0.5, 0.95, 0.99])) == repr([monitored[f"kl/{name}"] for name in summary.QUANTILES])
    made.close()


def test_texts_come_back(filled):
    assert "".join(filled.texts(0, filled.count)) == NASTY + "second file\n" * 4
    assert filled.texts(6, 9) == list(NASTY[6:9])


def test_hidden_states_come_back_to_the_bit():
    hidden = torch.randn(10, 3).bfloat16()
    file = store.HiddenFile(10)
    file.append(hidden[:4])
    file.append(hidden.t().contiguous().t()[4:])
    file.rewind()
    assert torch.equal(torch.cat([file.next(3), file.next(7)]), hidden)


def test_hidden_states_without_room_say_so_before_they_are_written():
    with pytest.raises(OSError, match="GB of hidden states"):
        store.HiddenFile(1 << 50).append(torch.zeros(1, 8))


# ---- text


@pytest.mark.parametrize("size", [1, 5, 40, 1000])
def test_pieces_are_the_file(tmp_path, monkeypatch, size):
    monkeypatch.setattr(inputs, "PIECE", size)
    content = (NASTY + "\r\n") * 5 + "a" * 100
    (tmp_path / "x").write_bytes(content.encode())
    found = list(inputs.pieces(tmp_path / "x"))
    assert "".join(found) == content and max(map(len, found)) <= size and all(found)


def test_pieces_end_where_a_line_begins_with_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "PIECE", 30)
    (tmp_path / "x").write_text("one two three\n\n  four five\nsix seven eight nine ten eleven twelve thirteen")
    assert list(inputs.pieces(tmp_path / "x"))[:3] == ["one two three\n\n  four five\n", "six seven eight nine ten", " eleven twelve thirteen"]


@pytest.mark.parametrize("seed", range(30))
def test_every_token_is_scored_once_with_its_context(seed):
    generator = random.Random(seed)
    start, context = generator.randrange(50), generator.randrange(8, 40)
    overlap = generator.randrange(context)
    document = store.Document("x", start, start + generator.choice([1, 2]), start + generator.randrange(3, 200))
    found = list(text.windows(document, context, overlap))
    assert [at for window in found for at in range(window.first, window.last)] == list(range(document.first, document.end))
    for window in found:
        assert 0 < window.last - 1 - window.start <= context  # what the models read
        assert window.first - window.start >= min(overlap + 1, window.first - document.start)
        assert window.start >= document.start


# ---- figures


def test_summary_is_that_of_all_values(filled):
    got, values = summary.summarise(filled), all_values(filled)
    assert got["tokens"] == len(values) == filled.scored
    assert got["same_top1"] == np.mean(values["top_a"] == values["top_b"])
    for name in summary.DIVERGENCES:
        column = values[name].astype(np.float64)
        expected = [column.mean(), *np.quantile(column, [0.5, 0.95, 0.99]), column.max()]
        np.testing.assert_allclose([got[name][key] for key in ("mean", "p50", "p95", "p99", "max")], expected, rtol=1e-12)
    for name in ("entropy_a", "entropy_b", "logprob_a", "logprob_b"):
        assert got[name] == pytest.approx(values[name].mean(dtype=np.float64), rel=1e-12)
    kl = values["kl_ab"].astype(np.float64)
    assert got["share_above_p99"] == pytest.approx(kl[kl > got["kl_ab"]["p99"]].sum() / kl.sum())


@pytest.mark.parametrize("by", ["document", "line"])
def test_units_are_sorted_and_add_up(filled, by):
    units = summary.worst_units(filled, by, 100)
    means = [unit.mean for unit in units]
    assert means == sorted(means, reverse=True)
    assert len(units) == (2 if by == "document" else 4 + 4)  # the empty line has its newline
    assert sum(unit.tokens for unit in units) == filled.scored
    total = sum(unit.sums[:3] for unit in units)
    np.testing.assert_allclose(total, [all_values(filled)[name].sum(dtype=np.float64) for name in summary.DIVERGENCES])
    for unit in units:
        values = filled.values(unit.first, unit.first + unit.tokens)
        assert unit.largest == values["kl_ab"].max() and unit.sums[3] == (values["top_a"] == values["top_b"]).sum()
        if by == "line":
            assert set(filled.tokens(unit.first, unit.first + unit.tokens)["line"]) == {unit.line}


def test_only_so_many_lines_are_kept(filled):
    every = summary.worst_units(filled, "line", 100)
    assert [unit.mean for unit in summary.worst_units(filled, "line", 3)] == [unit.mean for unit in every[:3]]


def test_worst_tokens_are_the_largest(filled):
    values = filled.values(0, filled.count)
    expected = sorted(range(filled.count), key=lambda at: (-values["kl_ab"][at] if values["scored"][at] else 1, at))
    assert summary.worst_tokens(filled, 9) == expected[:9]
    entry = summary.token_entry(filled, expected[0], characters)
    content = NASTY + "second file\n" * 4
    assert entry["token"] == content[expected[0]] and (entry["before"] + entry["token"] + entry["after"]) in content
    assert entry["expected_a"] == {"token": f"<{values['top_a'][expected[0]]}>", "probability": math.exp(values["top_logprob_a"][expected[0]])}


# ---- terminal


def test_first_screen_begins_with_the_answer(filled):
    shown = report.text_report(make_report(filled), False, 100)
    first, figures = " ".join(shown.split("\n\n")[0].split()), summary.summarise(filled)
    assert first.startswith(f"B differs strongly from A: KL(A‖B) is {figures['kl_ab']['mean']:.3g} nats per token")
    assert f"{1 - figures['same_top1']:.1%}" in first and f"with {figures['kl_ab']['max']:.3g}, before" in first and first.count(". ") == 0
    for needed in ("KL(B‖A)", "JSD", "p99", "entropy", "log-prob of the text", "perplexity", "same top-1", "cut to it", "documents by mean"):
        assert needed in shown


@pytest.mark.parametrize("color", [False, True])
def test_nothing_of_the_text_reaches_the_terminal_as_a_command(filled, color):
    shown = report.text_report(make_report(filled, "line", 200), color, 120)
    allowed = r"\x1b\[48;5;\d+m\x1b\[38;5;\d+m[^\x1b]*\x1b\[0m" if color else "(?!)"
    rest = re.sub(allowed, "", shown)
    assert bool(re.search(allowed, shown)) == color
    assert all(character.isprintable() or character == "\n" for character in rest)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("by", ["document", "line"])
def test_it_fits_the_terminal_and_loses_no_figure(filled, by, width):
    content, wide = make_report(filled, by), report.text_report(make_report(filled, by), False, 400)
    shown = report.text_report(content, False, width)
    assert max(map(len, shown.splitlines())) <= width and not re.search("\n\n\n", shown)
    figures = re.findall(r"(?<![\w.])\d[\d.]*%?(?![\w.])", wide.split("\n\n", 2)[2].split("tokens by")[0])
    assert len(figures) > 20 and not [figure for figure in figures if figure not in shown]
    painted = report.text_report(content, True, width)
    assert re.sub(r"\x1b\[[\d;]*m", "", painted) == shown


def test_a_single_token_has_no_quantiles_and_is_counted_as_one(filled):
    content = make_report(filled)
    content["summary"] |= {"tokens": 1, "same_top1": 0.0}
    first = report.sentence(content["summary"], content["units"][:1], content["top"][:1], "document")
    shown = report.text_report({**content, "sentence": first}, False, 200)
    assert "nats at the only token, before '" in first and "%, " not in first and "p50" not in shown and ", 1 token;" in shown
    assert "1 tokens" not in shown and "100.0%" not in first


def test_same_models_are_called_the_same(filled):
    figures = {"tokens": 7, "kl_ab": {"max": 0.0}, "kl_ba": {"max": 0.0}}
    assert report.sentence(figures, [], [], "document") == "A and B are the same on this text: the divergence of all 7 tokens is exactly 0."
    figures["tokens"] = 1
    assert report.sentence(figures, [], [], "document") == "A and B are the same on this text: the divergence of its only token is exactly 0."
    assert report.Scale({"kl_ab": {"max": 0.0, "p50": 0.0}}).level(0.0) == 0


def test_colours_rise_with_kl():
    scale = report.Scale({"kl_ab": {"max": 4.0, "p50": 0.01}})
    levels = [scale.level(kl) for kl in (0.0, 0.01, 0.011, 0.1, 1.0, 4.0)]
    assert levels == sorted(levels) and levels[:2] == [0, 0] and levels[2] == 1 and levels[-1] == len(report.TERMINAL) == len(page.COLOURS)


# ---- the page


class Page(html.parser.HTMLParser):
    """Elements opened and closed in order; the text of class "text"."""

    VOID = {"meta", "br"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text, self.ids, self.links, self.attributes = [], [], [], set(), set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        self.attributes.append(attrs)
        self.ids |= {attrs.get("id")}
        self.links |= {attrs.get("href")} - {None}
        if tag not in self.VOID:
            self.open.append((tag, attrs))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any(tag == "div" and attrs.get("class") == "text" for tag, attrs in self.open):
            self.text.append(data)


@pytest.mark.parametrize("by", ["document", "line"])
def test_page_is_well_formed_and_escaped_and_holds_the_text(filled, by):
    written = "".join(page.page(make_report(filled, by), filled, characters))
    parser = Page()
    parser.feed(written)
    parser.close()
    assert parser.open == [] and parser.tags.count("script") == 1 and parser.tags.count("style") == 1
    shown = NASTY.replace("\x1b", "␛").replace("\x07", "␇")
    assert "".join(parser.text) == shown + "second file\n" * 4
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", written)
    coloured = [attrs for attrs in parser.attributes if "data-v" in attrs]
    assert len(coloured) == filled.scored
    values = all_values(filled)
    assert [attrs["data-v"].split()[0] for attrs in coloured] == [f"{kl:.3g}" for kl in values["kl_ab"].tolist()]
    levels = [report.Scale(summary.summarise(filled)).level(kl) for kl in values["kl_ab"].tolist()]
    assert [int(attrs["class"].split()[0][1:]) for attrs in coloured] == levels
    assert len(parser.links) >= 5 and {link[1:] for link in parser.links} <= parser.ids
    assert "http:" not in written and "https:" not in written and " src=" not in written  # nothing beside itself


# ---- the command line


def test_help_is_enough_to_begin(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["compare", "--help"])
    shown = capsys.readouterr().out
    assert exit_.value.code == 0 and shown.isascii()
    for needed in ("fastkl compare ./my-model-v1 ./my-model-v2 --text notes.txt", "--html", "--json", "--by", "--top", "--context", "--overlap",
                   "--sequential", "--device", "--dtype", "--no-color", "nats", "pip install 'fastkl[compare]'",
                   "130 interrupted", "--top ones only"):
        assert needed in shown


@pytest.mark.parametrize("where", ["_device", "missing_modules"])
def test_an_interrupt_is_one_word(monkeypatch, capsys, where):
    """While the options are read, for which torch is loaded, and after."""
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, where, interrupt)
    assert cli.main(["compare", "a", "b", "--text", "x"]) == 130 and capsys.readouterr() == ("", "interrupted\n")


def test_without_its_extra_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(cli, "missing_modules", lambda names: [name for name in names if name == "transformers"])
    with pytest.raises(SystemExit) as exit_:
        cli.main(["compare", "a", "b", "--text", "x"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "fastkl compare: error: not installed: transformers; remedy: pip install 'fastkl[compare]'\n"


def test_errors_are_one_line():
    assert str(CompareError("--x", "a\nb", "c", "d")) == "--x: expected a b, got c; remedy: d"
