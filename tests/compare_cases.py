"""Tiny random checkpoints and texts for the tests of `fastkl compare`."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tqdm")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from fastkl.tools import cli  # noqa: E402
from fastkl.tools.compare import measure, run  # noqa: E402
from fastkl.tools.compare.settings import Settings  # noqa: E402

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


def make_tokenizer(begin=False, **options):
    """Byte-level BPE; begin: with <s> in front; options: of PreTrainedTokenizerFast."""
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
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", **options)


def save(folder, name="LlamaForCausalLM", seed=0, config=None, **options):
    """A random checkpoint with the tokenizer, whose logits are a few nats wide."""
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
    """Checkpoints a, b (b near a, padded: b with 13 more rows), texts one, two."""
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
    """(values of all tokens, the report, the tokens' ids per document)."""
    made = measure.Store()
    _, result = run.compare(Settings(a, b, **{"text": files.text, **options}), made)
    ids = [made.tokens["id"][each.start : each.end].tolist() for each in made.documents]
    return made.tokens, result, ids


def cli_run(capsys, *arguments):
    """(exit code, stdout, stderr)."""
    try:
        code = cli.main(["compare", *map(str, arguments)])
    except SystemExit as exit_:
        code = exit_.code
    return code, *capsys.readouterr()
