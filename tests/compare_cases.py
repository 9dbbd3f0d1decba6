"""Tiny random checkpoints and texts for the tests of `fastkl compare`."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("numpy")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from fastkl.tools import cli  # noqa: E402
from fastkl.tools.compare import loading, run, store  # noqa: E402
from fastkl.tools.compare.settings import Settings  # noqa: E402

WORDS = "the cat sat on a mat while naïve café 日本 readers of <b>bold</b> & 'quoted' text looked on.\n"
VOCABULARY = 300
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 256}


def make_tokenizer(**options):
    """Byte-level BPE; options: of PreTrainedTokenizerFast."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([WORDS * 3], trainer)
    if options.pop("begin", False):
        made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", **options)


def save(folder, tokenizer, kind="Llama", seed=0, head="LMHeadModel", model=None, **options):
    """A random checkpoint whose logits are a few nats wide; model: its class without the head, where that is not the configuration's."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, f"{model or kind}{head}")(config)
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_(std=0.35)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def silent():
    loading.quiet()


@pytest.fixture(scope="module", name="files")
def make_files(tmp_path_factory):
    """Checkpoints a, b (b near a, padded), texts one, two."""
    folder = tmp_path_factory.mktemp("compare")
    tokenizer = make_tokenizer()
    assert len(tokenizer) <= VOCABULARY
    a = save(folder / "a", tokenizer, head="ForCausalLM", **SIZES)
    model = transformers.AutoModelForCausalLM.from_pretrained(a)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.3)
    model.save_pretrained(folder / "b")
    tokenizer.save_pretrained(folder / "b")
    model.resize_token_embeddings(VOCABULARY + 13)
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] = 3.0
    model.save_pretrained(folder / "padded")
    tokenizer.save_pretrained(folder / "padded")
    one, two = folder / "one.txt", folder / "two & <b>.txt"
    one.write_text(WORDS * 3, encoding="utf-8")
    two.write_text("a mat of text\n\non the readers\r\n  sat" + WORDS[::-1], encoding="utf-8", newline="")
    return SimpleNamespace(folder=folder, tokenizer=tokenizer, a=a, b=str(folder / "b"), padded=str(folder / "padded"), text=(one, two))


def compare(files, a, b, folder, **options):
    """(values of all tokens, the report, the tokens' ids per document)."""
    folder.mkdir(exist_ok=True)
    made = store.Store()
    try:
        _, result = run.compare(Settings(a, b, **{"text": files.text, **options}), made)
        ids = [made.tokens(document.start, document.end)["id"].tolist() for document in made.documents]
        return made.values(0, made.count), result, ids
    finally:
        made.close()


def cli_run(capsys, *arguments):
    """(exit code, stdout, stderr)."""
    try:
        code = cli.main(["compare", *map(str, arguments)])
    except SystemExit as exit_:
        code = exit_.code
    return code, *capsys.readouterr()
