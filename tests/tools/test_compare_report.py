"""`fastkl compare` without transformers: windows, figures on disk, the terminal and the page."""

import html
import json
import math
import random
import re
import shutil
import subprocess
from xml.etree import ElementTree

import pytest

np = pytest.importorskip("numpy")
pd = pytest.importorskip("pandas")
pytest.importorskip("tqdm")

from compare_cases import COLUMNS  # noqa: E402

from fastkl.tools.compare import figures, page, report, windows  # noqa: E402

NASTY = (
    "naïve 日本語 <script>alert(\"1\")</script> & \x1b[31m\x07 \u202e'x'\n\nline\ttwo </div>\n  end"
)
SECOND = "second file\n" * 4


@pytest.fixture
def filled():
    # Two documents, a character a token, with random values; their first tokens have none.
    made = pd.DataFrame({"text": [*NASTY, *SECOND]})
    made["document"] = ["a & <b>.txt"] * len(NASTY) + ["b.txt"] * len(SECOND)
    newline, generator = (made["text"] == "\n").astype(int), np.random.default_rng(0)
    made["line"] = 1 + newline.groupby(made["document"]).cumsum() - newline
    made["id"] = made.groupby("document").cumcount()
    signs = [-1 if "logprob" in name else 1 for name in COLUMNS]
    made[[*COLUMNS]] = signs * generator.exponential(size=(len(made), len(COLUMNS))).round(1)
    made[["top_a", "top_b"]] = generator.integers(3, size=(len(made), 2))
    made["same_top1"] = (made["top_a"] == made["top_b"]) * 1.0
    made["tv"], made["window"] = generator.random(len(made)), made["id"] // 8
    made.loc[made["id"] == 0, [*COLUMNS, "tv", "same_top1"]] = math.nan
    return made


def make_report(made, by="document"):
    model = {"name": "mo<d>el", "class": "Llama", "dtype": "float32", "vocabulary": 64}
    model["bytes"] = 10**9
    models = [{**model, "adapter": None}, {**model, "adapter": {"kind": "LORA", "base": "x\x1b"}}]
    text = {"files": ["a & <b>.txt", "b.txt"], "skipped": [], "too_short": [], "documents": 2}
    text |= {"tokenizer": None, "vocabulary": 60, "window": 32, "stride": 24, "score": "all"}
    many = [{"id": at, "token": f"<{at}>"} for at in range(1500)]
    result = {"models": models, "text": {**text, "left_out": {"A": [], "B": many}}}
    result |= {"letter": "B", "by": by, "shown": 50, "summary": figures.summarise(made), "note": ""}
    for name in ("buckets", "histogram", "positions"):
        result[name] = getattr(figures, name)(made)
    result["units"] = figures.worst_units(made, by, 50)
    result["top"] = figures.worst_tokens(made, 50, "<{}>".format)
    return {**result, "sentence": report.sentence(result)}


@pytest.mark.parametrize("seed", range(10))
def test_every_token_is_scored_once_with_its_context(seed):
    generator = random.Random(seed)
    window, first = generator.randrange(8, 40), generator.choice([1, 2])
    stride, count = generator.randrange(1, window + 1), generator.randrange(3, 200)
    found = list(windows.cut(first, count, windows.Scheme(window, stride, "all")))
    assert [at for _, low, high in found for at in range(low, high)] == [*range(first, count)]
    for low, begin, last in found:
        assert 0 < last - 1 - low <= window and low >= 0  # what the models read
        assert begin - low >= min(window - stride + 1, first)


@pytest.mark.parametrize("by", ["document", "line"])
def test_units_and_tokens_are_the_worst(filled, by):
    content = NASTY + SECOND
    units = figures.worst_units(filled, by, 100)
    assert len(units) == (2 if by == "document" else 4 + 4)  # the empty line has its newline
    for unit in units:
        rows = filled[unit["index"] : unit["index"] + unit["tokens"]]
        assert unit["kl_ab"] == pytest.approx(rows["kl_ab"].mean(), rel=1e-12)
        assert unit["max_kl_ab"] == rows["kl_ab"].max() and rows["kl_ab"].notna().all()
        assert unit["same_top1"] == pytest.approx((rows["top_a"] == rows["top_b"]).mean())
        assert by == "document" or set(rows["line"]) == {unit["line"]}
    kl = filled["kl_ab"].fillna(-1)
    worst = figures.worst_tokens(filled, 9, "<{}>".format)
    assert [entry["index"] for entry in worst] == np.argsort(-kl, kind="stable")[:9].tolist()
    for entry in worst:
        row = filled.loc[entry["index"]]
        assert entry["token"] == content[entry["index"]] and entry["kl_ba"] == row["kl_ba"]
        assert entry["before"] + entry["token"] + entry["after"] in content
        expected = {"token": f"<{row['top_b']:.0f}>", "probability": math.exp(row["top_logprob_b"])}
        assert entry["expected_b"] == expected


@pytest.mark.parametrize("width", [60, 120])
def test_a_terminal_shows_all_figures_and_obeys_no_text(filled, width):
    content = make_report(filled)
    shown = report.text_report(content, width)
    assert all(character.isprintable() or character == "\n" for character in shown)
    for values in (content["summary"][name] for name in figures.DIVERGENCES):
        assert all(f"{value:.4g}" in shown for value in values.values())
    assert all(f"{unit['kl_ab']:.4g}" in shown for unit in content["units"])
    assert max(map(len, shown.partition("tokens by KL")[2].splitlines()[1:])) <= width


@pytest.mark.parametrize("by", ["document", "line"])
def test_a_page_is_well_formed_and_holds_the_text(filled, by):
    written = "".join(page.page(make_report(filled, by), filled, "<{}>".format))
    assert written.count("<script") == written.count("<style") == 1
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]|https?:| src=", written)
    start, end = written.index("<body>"), written.index('<div id="tip"')
    body = ElementTree.fromstring(f"{written[start:end]}</body>")
    text = "".join(part for each in body.iter("div") for part in each.itertext())
    assert text == NASTY.translate({0x1B: "␛", 7: "␇", 0x202E: "\ufffd"}) + SECOND
    kl = filled["kl_ab"].dropna().to_numpy()
    tokens = [each for each in body.iter("b") if each.get("data-v")]
    assert [each.get("data-v").split()[0] for each in tokens] == [f"{value:.3g}" for value in kl]
    levels = np.array([int(each.get("class").split()[0][1:]) for each in tokens])
    assert (np.diff(levels[np.argsort(kl, kind="stable")]) >= 0).all() and {*levels} >= {0, 8}
    links = {each.get("href") for each in body.iter("a")}
    assert len(links) > 5 and links <= {f"#{each.get('id')}" for each in body.iter()}


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
# Points at the token with the largest KL, and notes what is seen.
POINT = """<script>
const worst=document.querySelector(".text .k8"),box=worst.getBoundingClientRect();
worst.dispatchEvent(new MouseEvent("mousemove",{bubbles:true,clientX:380,clientY:box.top}));
const at=tip.getBoundingClientRect(),page=document.documentElement;
document.title=JSON.stringify({tip:tip.textContent,right:at.right,width:innerWidth,
scrolled:page.scrollWidth,paper:getComputedStyle(document.body).backgroundColor});
</script>"""


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_page_on_a_narrow_screen(filled, tmp_path, dark):
    written = "".join(page.page(make_report(filled), filled, "<{}>".format))
    path = tmp_path / "x.html"
    path.write_text(written.replace("</body>", f"{POINT}</body>"), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=500,900"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    dumped = subprocess.run(
        [BROWSER, *options, f"--user-data-dir={tmp_path}", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    seen = json.loads(html.unescape(re.search("<title>(.*?)</title>", dumped)[1]))
    assert seen["tip"].startswith(f"KL(A‖B)     {filled['kl_ab'].max():.3g}\nKL(B‖A)")
    assert seen["right"] <= seen["width"] and seen["scrolled"] <= seen["width"]
    assert seen["paper"] == ("rgb(22, 24, 28)" if dark else "rgb(255, 255, 255)")
