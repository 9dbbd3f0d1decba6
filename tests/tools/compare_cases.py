"""Tiny random checkpoints and texts for the tests of `fastkl compare`."""

import functools
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("tqdm")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from fastkl import testing  # noqa: E402
from fastkl.tools import cli  # noqa: E402
from fastkl.tools.compare import figures, loading, run  # noqa: E402

WORDS = (
    "the cat sat on a mat while naïve café 日本 readers of <b>bold</b> & 'quoted' text looked on.\n"
)
VOCABULARY = 300
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def make_tokenizer(*added, begin=False, **options):
    # Byte-level BPE; added: special tokens behind its vocabulary; begin: with <s> in front;
    # options: of PreTrainedTokenizerFast.
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([WORDS * 3], trainer)
    if begin:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    options |= {"tokenizer_object": made, "bos_token": "<s>"}
    return transformers.PreTrainedTokenizerFast(additional_special_tokens=[*added], **options)


def save(folder, name="LlamaForCausalLM", seed=0, config=None, **options):
    # A random checkpoint with the tokenizer, whose logits are a few nats wide.
    torch.manual_seed(seed)
    config = config or name.partition("For")[0].removesuffix("LMHeadModel") + "Config"
    model = getattr(transformers, name)(getattr(transformers, config)(**options))
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_(std=0.35)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session", name="files")
def make_files(tmp_path_factory):
    # Checkpoints a, b (b near a, padded: b with 13 more rows), texts one, two.
    folder = tmp_path_factory.mktemp("compare")
    model = transformers.AutoModelForCausalLM.from_pretrained(save(folder / "a", **SIZES))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.3)
    model.save_pretrained(folder / "b")
    model.resize_token_embeddings(VOCABULARY + 13)
    model.lm_head.weight.data[VOCABULARY:] = 3.0
    model.save_pretrained(folder / "padded")
    for name in ("b", "padded"):
        make_tokenizer().save_pretrained(folder / name)
    one, two = folder / "one.txt", folder / "two & <b>.txt"
    one.write_text(WORDS * 3, encoding="utf-8")
    two.write_bytes(("a mat of text\n\non the readers\r\n  sat" + WORDS[::-1]).encode())
    paths = {name: str(folder / name) for name in ("a", "b", "padded")}
    return SimpleNamespace(folder=folder, text=(one, two), **paths)


def compare(files, a, b, **options):
    # (table of all tokens, the report, the tokens' ids per document).
    settings = cli.build_parser().parse_args(["compare", a, b, "--text", "x", "--device", "cpu"])
    vars(settings).update({"text": files.text, "documents": None, **options})
    ((result, tokens, _),), _ = run.compare(settings, *run.open_models(settings))
    ids = tokens.groupby("document", sort=False)["id"]
    return tokens, result, [part.tolist() for _, part in ids]


def cli_run(capsys, *arguments):
    # (exit code, stdout, stderr).
    try:
        code = cli.main(["compare", *map(str, arguments)])
    except SystemExit as ended:
        code = ended.code
    return code, *capsys.readouterr()


def refused(capsys, expected, *arguments):
    # One line on stderr, exit code 2, and nothing on stdout.
    code, shown, said = cli_run(capsys, *arguments)
    line = re.split(r"[\r\n]", said.strip())[-1]
    assert (code, shown) == (2, "") and "Traceback" not in said, said
    assert line.startswith("fastkl compare: error: ") and "; remedy: " in line
    assert re.match(expected, line.partition("error: ")[2]), line


@pytest.fixture(name="loads")
def make_loads(monkeypatch):
    # The checkpoints that were loaded.
    names, load = [], loading.Checkpoint.load
    note = lambda self, *rest: names.append(self.name) or load(self, *rest)  # noqa: E731
    monkeypatch.setattr(loading.Checkpoint, "load", note)
    return names


# ---- the truth

COLUMNS = (*figures.MEANS, "top_logprob_a", "top_logprob_b", "top_a", "top_b")
# A logit of up to 20, in float32. Where it is off by this much, so is its log-probability, and by
# as much again through the sum; an entropy and a KL by this times the log-probabilities and
# log-ratios that weigh it, of 2 and 4 nats in the mean; the JSD's log-ratios stay below ln 2.
LOGIT = 20 * float(np.finfo(np.float32).eps)
TOLERANCE = {"kl_ab": 4 * LOGIT, "kl_ba": 4 * LOGIT, "jsd": LOGIT, "top_a": 0, "top_b": 0}


@functools.lru_cache(8)
def wide_model(name):
    # The checkpoint in float64, with its adapter.
    source, adapter = name, Path(name, "adapter_config.json")
    if adapter.exists():
        source = json.loads(adapter.read_text())["base_model_name_or_path"]
    config = transformers.AutoConfig.from_pretrained(source)
    model = getattr(transformers, config.architectures[0])
    model = model.from_pretrained(source, dtype=torch.float64).eval()
    if adapter.exists():
        peft = pytest.importorskip("peft").PeftModel
        model = peft.from_pretrained(model, name, autocast_adapter_dtype=False).double().eval()
    return model, config.model_type == "paligemma"


@torch.no_grad()
def log_probs(name, ids, window, stride, columns):
    # [n - 1, V] in float64: each token from the first window that reaches it.
    (model, marked), rows = wide_model(name), []
    start_of = lambda target: max(0, math.ceil((target - window) / stride)) * stride  # noqa: E731
    for start, targets in itertools.groupby(range(1, len(ids)), start_of):
        targets = list(targets)
        read = torch.tensor([ids[start : targets[-1]]])
        more = {"token_type_ids": torch.ones_like(read)} if marked else {}
        logits = model(input_ids=read, use_cache=False, **more).logits[0]
        rows.append(logits[targets[0] - 1 - start :, list(columns)].log_softmax(-1))
    return torch.cat(rows)


def jsd(p, q):
    # Of log-probabilities in float64.
    mixture = ((p.exp() + q.exp()) / 2).log()
    return (testing.truth(p, mixture).kl + testing.truth(q, mixture).kl) / 2


def truth(a, b, ids, window=256, stride=256, columns=range(VOCABULARY)):
    # The columns in plain float64.
    p, q = (log_probs(name, ids, window, stride, columns) for name in (a, b))
    tokens, values = torch.tensor(ids[1:]) - columns[0], {"jsd": jsd(p, q)}
    for letter, other, log, against in (("a", "b", p, q), ("b", "a", q, p)):
        stats = testing.truth(log, against).stats(tokens)
        values |= {
            f"kl_{letter}{other}": stats["kl"],
            f"entropy_{letter}": stats["entropy"],
            f"logprob_{letter}": stats["logprob"],
            f"top_logprob_{letter}": log.amax(-1),
            f"top_{letter}": log.argmax(-1) + columns[0],
        }
    return {name: value.numpy() for name, value in values.items()}


def assert_true(tokens, expected, slack=1):
    scored = tokens[tokens["kl_ab"].notna()]
    for name in COLUMNS:
        bound = slack * TOLERANCE.get(name, 2 * LOGIT)
        np.testing.assert_allclose(scored[name], expected[name], rtol=0, atol=bound, err_msg=name)
