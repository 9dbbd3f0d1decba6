"""`fastkl compare` on folders that PEFT wrote: compared as what the layers compute with them."""

import json
import shutil
import sys

import pytest
import torch

np = pytest.importorskip("numpy")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
save_file = pytest.importorskip("safetensors.torch").save_file
from compare_cases import (  # noqa: E402
    SIZES,
    VOCABULARY,
    assert_true,
    compare,
    make_files,  # noqa: F401
    make_tokenizer,
    refused,
    save,
    truth,
)

from fastkl.tools.compare import CompareError, loading, report  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def trained(base, folder, config=None, scale=1.0, rows=None, **options):
    """A folder with an adapter on the base whose change is `scale` times a random one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    torch.manual_seed(3)
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(model, config or peft.LoraConfig(r=4, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3 * scale)
        elif "modules_to_save" in name or "trainable_tokens_delta" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1 * scale)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", name="narrow")
def make_narrow(files, tmp_path_factory):
    """The base in bfloat16."""
    folder = tmp_path_factory.mktemp("narrow")
    model = transformers.AutoModelForCausalLM.from_pretrained(files.a, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["lm_head"], "lora_bias": True},
        {"target_modules": ["lm_head"], "use_dora": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [3, 70, 71]},
    ],
)
def test_adapters_have_the_divergence_of_their_layers(files, narrow, tmp_path, options):
    """Without a tokenizer, they have that of the base."""
    folder = trained(files.a, tmp_path / "adapter", **options)
    tokens, result, ids = compare(files, files.a, folder, text=files.text[1:])
    assert_true(tokens, truth(files.a, folder, ids[0]), slack=4)
    adapters = [model["adapter"] for model in result["models"]]
    assert adapters == [None, {"kind": "LORA", "base": files.a}]
    shown = report.text_report(result, 400)
    assert f"(LORA adapter on {files.a}, LlamaForCausalLM, float32)" in " ".join(shown.split())


@pytest.mark.parametrize("scale", [1e-3, 0.0])
def test_a_change_below_bfloat16_is_not_rounded_away_in_the_head(files, narrow, tmp_path, scale):
    """Nor in a head that the file holds in float32 (scale 0)."""
    options = {"target_modules": ["lm_head"]} if scale else {"modules_to_save": ["lm_head"]}
    folder = trained(narrow, tmp_path / "adapter", scale=scale, **options)
    if not scale:
        weights = peft.load_peft_weights(folder, device="cpu")
        weights = {key: value.float() for key, value in weights.items()}
        head = next(key for key in weights if "lm_head" in key)
        weights[head] += 1e-4 * torch.randn(VOCABULARY, 32)
        save_file(weights, f"{folder}/adapter_model.safetensors", {"format": "pt"})
    tokens, result, ids = compare(files, narrow, folder, text=files.text[1:])
    names = (narrow, folder)
    base, changed = (loading.Checkpoint("MODEL", name).load("auto", "cpu") for name in names)
    assert result["models"][1]["dtype"] == "bfloat16"
    # The hidden states are those of the base, so the truth is the two heads' in float64.
    with torch.no_grad():
        hidden = base.hidden(torch.tensor(ids[0][:-1])).double()
    weights = (model.head.weight.double().t() for model in (base, changed))
    p, q = ((hidden @ weight).log_softmax(-1) for weight in weights)
    expected = (p.exp() * (p - q)).sum(-1)
    np.testing.assert_allclose(tokens["kl_ab"][1:], expected, rtol=2e-2, atol=2e-8)
    assert 1e-9 < tokens["kl_ab"][1:].mean() < 1e-3
    gone = trained(narrow, tmp_path / "gone", scale=1e-12)
    said = compare(files, narrow, gone, text=files.text[1:])[1]["sentence"]
    assert said.endswith("A change that bfloat16 rounds away shows with --dtype float32.")


def test_an_adapter_with_added_tokens(files, tmp_path):
    """Its embeddings are in its file, and the base grows to them."""
    saved = ["embed_tokens", "lm_head"]
    folder = trained(files.a, tmp_path / "x", rows=VOCABULARY + 4, modules_to_save=saved)
    more = make_tokenizer()
    more.add_special_tokens({"pad_token": "<pad>"})
    more.save_pretrained(folder)
    _, result, _ = compare(files, files.a, folder, text=files.text[1:])
    assert result["models"][1]["vocabulary"] == VOCABULARY + 4
    assert result["text"]["left_out"] == {"A": [], "B": [{"id": VOCABULARY, "token": "<pad>"}]}
    assert result["text"]["vocabulary"] == VOCABULARY and result["summary"]["kl_ab"]["mean"] > 1e-3


def unusable(files, folder, how):
    """An adapter with something wrong."""
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    path = trained(files.a, folder, prompt if how == "prompt" else None)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    fields = json.loads(config.read_text())
    if how == "incomplete":
        save_file(dict(list(peft.load_peft_weights(path, device="cpu").items())[1:]), weights)
    elif how == "narrower":
        options = {**SIZES, "hidden_size": 16}
        fields["base_model_name_or_path"] = save(folder / "base", **options)
    elif how == "pickle":
        weights.unlink()
        torch.save({"x": print}, folder / "adapter_model.bin")
    fields |= {"base_model_name_or_path": "/no/where"} if how == "gone" else {}
    config.write_text("{" if how == "broken" else json.dumps(fields))
    return path


LOADS = "an adapter that peft loads"
FITS = "an adapter that fits its base model '"


@pytest.mark.parametrize(
    "how, expected",
    [
        *((how, LOADS) for how in ("gone", "broken", "prompt", "pickle")),
        *((how, FITS) for how in ("incomplete", "narrower")),
    ],
)
def test_adapters_that_cannot_be_used(files, tmp_path, capsys, monkeypatch, how, expected):
    """A model loads only where its weights must be seen for it."""
    folder = unusable(files, tmp_path / "adapter", how)
    if expected == LOADS:
        monkeypatch.setattr(loading.Checkpoint, "load", lambda *arguments: 1 / 0)
    arguments = (files.a, folder, "--text", files.text[1], "--device", "cpu")
    refused(capsys, f"MODEL_B: expected {expected}", *arguments)


def test_without_peft_it_says_what_to_install(files, tmp_path, monkeypatch):
    folder = trained(files.a, tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(CompareError, match="^MODEL_A: expected .*pip install peft"):
        loading.Checkpoint("MODEL_A", folder)


def test_a_whole_model_beside_an_adapter_is_the_model(files, tmp_path, capsys):
    """A config.json alone does not make a model. No file of the base is written over."""
    folder = trained(files.a, tmp_path / "adapter")
    shutil.copy(f"{files.a}/config.json", folder)
    arguments = ("--text", files.text[1], "--json", f"{files.a}/config.json")
    refused(capsys, "--json: expected a file that has no other use", files.b, folder, *arguments)
    assert loading.Checkpoint("MODEL_B", folder).adapter["kind"] == "LORA"
    shutil.copy(f"{files.a}/model.safetensors", folder)
    assert loading.Checkpoint("MODEL_B", folder).adapter is None


def test_an_adapter_on_the_hub_by_its_name(files, tmp_path, monkeypatch):
    """Base and adapter are in the cache, without a connection."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folders = {}
    for name in ("base", "adapter"):
        repository = tmp_path / f"models--org--{name}"
        folders[name] = repository / "snapshots" / ("a" * 40)
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(files.a, folders["base"])
    trained(files.a, folders["adapter"])
    expected = compare(files, files.a, str(folders["adapter"]))[0]
    path = folders["adapter"] / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    tokens, result, _ = compare(files, "org/base", "org/adapter")
    assert tokens.tobytes() == expected.tobytes()
    assert result["models"][1]["adapter"] == {"kind": "LORA", "base": "org/base"}
    with pytest.raises(CompareError, match="^MODEL_B: expected a model folder or a hub name, got "):
        loading.Checkpoint("MODEL_B", "org/none")
