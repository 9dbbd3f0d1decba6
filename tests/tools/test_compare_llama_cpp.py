"""llama.cpp's table and logits base files, beside plain float64 by that tool's definitions."""

import math
import re

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("transformers")
from compare_cases import (  # noqa: E402
    VOCABULARY,
    cli_run,
    make_files,  # noqa: F401
    make_tokenizer,
    refused,
    wide_model,
)

WINDOW = 32
NUMBER = r"-?\d+\.\d+"


@torch.no_grad()
def second_halves(name, ids, begin=None, size=VOCABULARY, sharp=1.0):
    # Log-probs [n, size] in float64 of the second half of every whole window, and the tokens there;
    # sharp: a factor of the logits.
    rows, tokens = [], []
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        read = torch.tensor([ids[start : start + WINDOW]])
        if begin is not None:
            read[0, 0] = begin
        logits = wide_model(name)[0](input_ids=read, use_cache=False).logits[0]
        rows.append((sharp * logits[WINDOW // 2 : -1, :size]).log_softmax(-1))
        tokens.append(torch.tensor(ids[start + WINDOW // 2 + 1 : start + WINDOW]))
    return torch.cat(rows).numpy(), torch.cat(tokens).numpy()


def expected_table(log_p, log_q, tokens, kld):
    # Each field of the table by its title: (value, error), or (value,) where none is printed.
    at = np.arange(len(tokens))
    base, own = -log_p[at, tokens], -log_q[at, tokens]
    change, n = 100 * (np.exp(-own) - np.exp(-base)), len(tokens)
    error = lambda values: values.std() / math.sqrt(n - 1)  # noqa: E731
    ratio, same = own - base, 100 * (log_p.argmax(-1) == log_q.argmax(-1))
    ppl, ppl_base = math.exp(own.mean()), math.exp(base.mean())
    rms = math.sqrt((change**2).mean())
    # d(exp(x) - exp(y)) = exp(x)·dx - exp(y)·dy
    off = error(ppl * own - ppl_base * base)
    fields = {
        "Mean PPL(Q)": (ppl, ppl * error(own)),
        "Mean PPL(base)": (ppl_base, ppl_base * error(base)),
        "Cor(ln(PPL(Q)), ln(PPL(base)))": (100 * np.corrcoef(own, base)[0, 1],),
        "Mean ln(PPL(Q)/PPL(base))": (ratio.mean(), error(ratio)),
        "Mean PPL(Q)/PPL(base)": (ppl / ppl_base, ppl / ppl_base * error(ratio)),
        "Mean PPL(Q)-PPL(base)": (ppl - ppl_base, off),
        "Mean KLD": (kld.mean(), error(kld)),
        "Mean Δp": (change.mean(), error(change)),
        "RMS Δp": (rms, error(change**2) / (2 * rms)),
        "Same top p": (same.mean(), error(same)),
    }
    quantiles = [99.9, 99.0, 95.0, 90.0, 10.0, 5.0, 1.0, 0.1]
    for name, values, more in (("KLD", kld, []), ("Δp", change, [75.0, 25.0])):
        for title, level in (("Maximum", 100), ("Median", 50), ("Minimum", 0)):
            fields[f"{title} {name}"] = (np.quantile(values, level / 100),)
        for level in quantiles + more:
            fields[f"{level}% {name}"] = (np.quantile(values, level / 100),)
    return fields


def read_table(shown):
    # Each field of the printed table by its title.
    found = {}
    for line in shown.splitlines():
        title, colon, numbers = line.rpartition(":")
        if colon:
            key = " ".join(title.split())
            assert key not in found, key
            found[key] = tuple(float(each) for each in re.findall(NUMBER, numbers))
    return found


def assert_table(shown, expected):
    found = read_table(shown)
    assert found.keys() == expected.keys()
    for title, values in expected.items():
        # Printed with six digits behind the point, or three; computed from float32 logits.
        digits = 2e-5 if "PPL(" in title or "KLD" in title else 2e-3
        bound = 1e-2 if title.startswith("Cor") else digits
        np.testing.assert_allclose(found[title], values, rtol=2e-5, atol=bound, err_msg=title)


@pytest.fixture(name="long")
def make_long(files, tmp_path):
    # A text of eight whole windows and a rest, and its tokens.
    path = tmp_path / "long.txt"
    path.write_text(files.text[0].read_text(encoding="utf-8") * 9, encoding="utf-8")
    ids = make_tokenizer()(path.read_text(encoding="utf-8"))["input_ids"]
    assert len(ids) > 8 * WINDOW and len(ids) % WINDOW
    return path, ids


def test_the_table_of_two_models(files, long, capsys):
    path, ids = long
    options = ("--format", "llama.cpp", "--window", WINDOW, "--device", "cpu")
    code, shown, _ = cli_run(capsys, files.a, files.padded, "--text", path, *options)
    assert code == 0
    (log_p, tokens), (log_q, _) = (second_halves(each, ids) for each in (files.a, files.b))
    kld = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    assert_table(shown, expected_table(log_p, log_q, tokens, kld))


def write_base_file(path, name, ids, begin=None, size=VOCABULARY, sharp=1.0):
    # As llama-perplexity --kl-divergence-base writes it, in float32; return it in float64.
    log_p, tokens = second_halves(name, ids, begin, size, sharp)
    chunks, rows = len(ids) // WINDOW, (log_p - log_p.max(-1, keepdims=True)).astype(np.float32)
    low = np.maximum(rows.min(-1, keepdims=True), np.float32(-16))
    scale = -low / np.float32(65535)
    codes = np.where(rows > low, np.rint((rows - low) / scale), 0).astype("<u2")
    minimum = low - np.log(np.exp(rows).sum(-1, keepdims=True))
    head = np.concatenate([scale, minimum], -1).astype("<f4").view("<u2")
    odd = np.zeros((len(rows), size % 2), "<u2")
    header = np.array([WINDOW, size, chunks], "<i4").tobytes()
    text = np.array(ids[: chunks * WINDOW], "<i4").tobytes()
    path.write_bytes(b"_logits_" + header + text + np.concatenate([head, codes, odd], -1).tobytes())
    return codes * scale.astype(np.float64) + minimum, tokens


@pytest.mark.parametrize("begin, size, sharp", [(0, 300, 1.0), (1, 300, 5.0), (0, 301, 5.0)])
def test_a_base_file_by_llama_cpps_definitions(files, long, tmp_path, capsys, begin, size, sharp):
    # With and without a special token in place of each window's first, an odd vocabulary, and
    # log-probs below -16.
    path, ids = tmp_path / "base.kld", long[1]
    b = tmp_path / "b"
    b.mkdir()
    for file in (files.folder / "padded").iterdir():
        (b / file.name).symlink_to(file)
    if begin:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (b / name).unlink()
        make_tokenizer(begin=True).save_pretrained(b)
    own = (ids, 0 if begin else None, size)
    base = files.a if size == VOCABULARY else files.padded
    stored, tokens = write_base_file(path, base, *own, sharp)
    log_q, _ = second_halves(files.padded, *own)
    kept = stored > -16
    assert kept.all() == (sharp == 1)
    kld = np.where(kept, np.exp(stored) * (stored - log_q), 0).sum(-1)
    code, shown, _ = cli_run(capsys, path, b, "--format", "llama.cpp", "--device", "cpu")
    assert code == 0
    assert_table(shown, expected_table(stored, log_q, tokens, kld))
    # The report normalises over what the file holds, so that no KL is negative.
    code, shown, _ = cli_run(capsys, path, b, "--device", "cpu", "--json", tmp_path / "x.json")
    held = [np.where(kept, each, -np.inf) for each in (stored, log_q)]
    p, q = (each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in held)
    exact = np.where(kept, np.exp(p) * (p - q), 0).sum(-1)
    assert f"the mean is {exact.mean():.4g}" in " ".join(shown.split())
    assert f"its mean is {kld.mean():.4g}, and {(kld < 0).sum()} of " in " ".join(shown.split())


def test_a_model_beside_its_own_base_file(files, long, tmp_path, capsys):
    # llama.cpp's KLD of it is rounding, of either sign; ours is at the square of it.
    path = tmp_path / "base.kld"
    write_base_file(path, files.a, long[1])
    code, shown, _ = cli_run(capsys, path, files.a, "--device", "cpu", "--format", "llama.cpp")
    assert code == 0 and read_table(shown)["Minimum KLD"][0] < -1e-6
    tokens = tmp_path / "x.jsonl"
    cli_run(capsys, path, files.a, "--device", "cpu", "--tokens", tokens)
    kl = [
        float(each)
        for each in re.findall(r'"kl_ab":([^,]+),', tokens.read_text())
        if each != "null"
    ]
    assert 0 <= min(kl) and max(kl) < 1e-7 and len(kl) == 15 * (len(long[1]) // WINDOW)


def test_base_files_that_cannot_be_used(files, long, tmp_path, capsys):
    path = tmp_path / "base.kld"
    write_base_file(path, files.a, long[1])
    refused(capsys, "--text: expected nothing, for MODEL_A", path, files.b, "--text", long[0])
    refused(capsys, "--tokenizer: expected nothing, for", path, files.b, "--tokenizer", "A")
    refused(capsys, "--floor: expected a model as MODEL_A", path, files.b, "--floor")
    path.write_bytes(path.read_bytes()[:-7])
    refused(capsys, "MODEL_A: expected a whole logits base file of llama.cpp", path, files.b)
    path.write_bytes(path.read_bytes()[:11])
    refused(capsys, "MODEL_A: expected a whole logits base file of llama.cpp", path, files.b)
