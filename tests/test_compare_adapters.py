"""`fastkl compare` on folders that PEFT wrote: an adapter is compared as what its layers compute, however small its change."""

import json
import shutil

import pytest
import torch

np = pytest.importorskip("numpy")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
save_file = pytest.importorskip("safetensors.torch").save_file
pytest.importorskip("tqdm")

from compare_cases import SIZES, VOCABULARY, cli_run, compare, make_files, save, silent  # noqa: E402, F401

from fastkl.tools.compare import adapters, loading, report  # noqa: E402
from fastkl.tools.compare.settings import CompareError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def trained(base, folder, config=None, scale=1.0, rows=None, **options):
    """A folder with an adapter on the base whose change is `scale` times a random one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    torch.manual_seed(3)
    options = {"target_modules": ["q_proj", "v_proj"], **options}
    model = peft.get_peft_model(
        model, config or peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.normal_(std=0.3 * scale)
            elif "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1 * scale)
    model.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def divergence(base, folder, ids):
    """KL(A‖B) of base and adapter in float64."""
    p = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    q = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    q = peft.PeftModel.from_pretrained(q, folder, autocast_adapter_dtype=False).double().eval()
    first, second = (
        model(input_ids=torch.tensor([ids[:-1]])).logits[0, :, :VOCABULARY].log_softmax(-1)
        for model in (p, q)
    )
    return (first.exp() * (first - second)).sum(-1)


@pytest.fixture(scope="module", name="narrow")
def make_narrow(files, tmp_path_factory):
    """The base in bfloat16."""
    folder = tmp_path_factory.mktemp("narrow")
    transformers.AutoModelForCausalLM.from_pretrained(
        files.a, dtype=torch.bfloat16
    ).save_pretrained(folder)
    files.tokenizer.save_pretrained(folder)
    return str(folder)


KINDS = {
    "layers": {},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head with a bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "dora head": {"target_modules": ["lm_head"], "use_dora": True},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "some tokens": {"trainable_token_indices": [3, 70, 71]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_have_the_divergence_of_their_layers(files, tmp_path, kind):
    folder = trained(
        files.a, tmp_path / "adapter", **KINDS[kind]
    )  # without a tokenizer: its base's
    values, result, ids = compare(files, files.a, folder, tmp_path / "out", text=files.text[1:])
    expected = divergence(files.a, folder, ids[0])
    assert expected.mean() > 1e-4
    np.testing.assert_allclose(values["kl_ab"][1:], expected, rtol=1e-4, atol=2e-5)
    assert (
        result["models"][1]["adapter"] == {"kind": "LORA", "base": files.a}
        and result["models"][0]["adapter"] is None
    )
    assert f"(LORA adapter on {files.a}, LlamaForCausalLM, float32)" in " ".join(
        report.text_report(result, False, 400).split()
    )


@pytest.mark.parametrize("kind", ["head", "saved head"])
def test_a_change_below_bfloat16_is_not_rounded_away_in_the_head(files, narrow, tmp_path, kind):
    """A merge in bfloat16 would round nearly all of it away; so would the base's type for a head that the file holds in float32."""
    options = {
        "head": {"target_modules": ["lm_head"]},
        "saved head": {"modules_to_save": ["lm_head"], "target_modules": ["v_proj"]},
    }[kind]
    folder = trained(narrow, tmp_path / "adapter", scale=1e-3 if kind == "head" else 0.0, **options)
    if kind == "saved head":
        weights = {
            key: value.float()
            for key, value in peft.load_peft_weights(folder, device="cpu").items()
        }
        head = next(key for key in weights if "lm_head" in key)
        torch.manual_seed(5)
        save_file(
            weights | {head: weights[head] + 1e-4 * torch.randn(VOCABULARY, 32)},
            f"{folder}/adapter_model.safetensors",
            {"format": "pt"},
        )
    values, result, ids = compare(files, narrow, folder, tmp_path / "out", text=files.text[1:])
    base, changed = (loading.load_model("MODEL", name, "auto", "cpu") for name in (narrow, folder))
    assert base.head.weight.dtype is torch.bfloat16 and changed.head.weight.dtype is torch.float32
    merged = changed.head.weight.bfloat16()
    assert (changed.head.weight != base.head.weight).float().mean() > 0.99 and (
        merged != base.head.weight
    ).float().mean() < 0.2
    assert result["models"][1]["dtype"] == "bfloat16"
    # The hidden states are those of the base, so the truth is the two heads' in float64.
    with torch.no_grad():
        hidden = base.hidden(torch.tensor(ids[0][:-1])).double()
    p, q = ((hidden @ model.head.weight.double().t()).log_softmax(-1) for model in (base, changed))
    np.testing.assert_allclose(
        values["kl_ab"][1:], (p.exp() * (p - q)).sum(-1), rtol=2e-2, atol=2e-8
    )
    assert 1e-9 < values["kl_ab"][1:].mean() < 1e-3


def test_a_small_change_of_the_layers_is_seen_in_bfloat16_or_said_to_be_rounded(
    files, narrow, tmp_path
):
    seen = trained(narrow, tmp_path / "seen", scale=1e-2)
    assert compare(files, narrow, seen, tmp_path / "out")[1]["summary"]["kl_ab"]["max"] > 0
    gone = trained(narrow, tmp_path / "gone", scale=1e-12)
    said = compare(files, narrow, gone, tmp_path / "out", text=files.text[1:])[1]["sentence"]
    assert said.endswith(
        "is exactly 0. A change that bfloat16 rounds away shows with --dtype float32."
    )


def test_one_after_the_other_gives_the_same_bits_for_adapters(files, narrow, tmp_path):
    folder = trained(narrow, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    got = [
        compare(files, folder, narrow, tmp_path / str(way), sequential=way) for way in (False, True)
    ]
    assert got[0][0].tobytes() == got[1][0].tobytes()


def test_an_adapter_with_added_tokens(files, tmp_path):
    """Its embeddings are in its file, and the base grows to them."""
    folder = trained(
        files.a,
        tmp_path / "adapter",
        rows=VOCABULARY + 4,
        modules_to_save=["embed_tokens", "lm_head"],
    )
    more = transformers.AutoTokenizer.from_pretrained(files.a)
    more.add_special_tokens({"pad_token": "<pad>"})
    more.save_pretrained(folder)
    _, result, _ = compare(files, files.a, folder, tmp_path / "out", text=files.text[1:])
    assert (
        result["models"][1]["vocabulary"] == VOCABULARY + 4
        and result["text"]["vocabulary"] == VOCABULARY
    )
    assert (
        result["text"]["left_out"] == {"A": [], "B": [{"id": VOCABULARY, "token": "<pad>"}]}
        and result["summary"]["kl_ab"]["mean"] > 1e-3
    )


def spoil(files, folder, how):
    """An adapter with something wrong."""
    if how == "prompt":
        return trained(
            files.a, folder, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        )
    path = trained(files.a, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    if how == "gone":
        config["base_model_name_or_path"] = "/no/where"
    elif how == "nameless":
        config["base_model_name_or_path"] = None
    elif how == "broken":
        (folder / "adapter_config.json").write_text("{")
        return path
    elif how == "unknown":
        config["peft_type"] = "NEW"
    elif how == "kindless":
        del config["peft_type"]
    elif how == "weightless":
        (folder / "adapter_model.safetensors").unlink()
    elif how == "incomplete":
        weights = peft.load_peft_weights(path, device="cpu")
        save_file(dict(list(weights.items())[1:]), folder / "adapter_model.safetensors")
    elif how == "narrower":
        config["base_model_name_or_path"] = save(
            folder / "base", files.tokenizer, head="ForCausalLM", **{**SIZES, "hidden_size": 16}
        )
    elif how == "pickle":
        (folder / "adapter_model.safetensors").unlink()
        torch.save({"x": print}, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    "how, expected, loads",
    [
        (
            "gone",
            "expected an adapter whose base model is there, in '{}', got the base '/no/where': '/no/where', which does not exist;",
            0,
        ),
        (
            "nameless",
            "expected an adapter that names its base model, got None in '{}'; remedy: set base_model_name_or_path in its adapter_config.json",
            0,
        ),
        (
            "broken",
            "expected an adapter with an adapter_config.json that peft reads, got '{}': ",
            0,
        ),
        (
            "unknown",
            "expected an adapter with an adapter_config.json that peft reads, got '{}': ",
            0,
        ),
        (
            "kindless",
            "expected an adapter with an adapter_config.json that peft reads, got '{}': ",
            0,
        ),
        (
            "prompt",
            "expected an adapter of a model's weights, such as LORA, got '{}', a PROMPT_TUNING;",
            0,
        ),
        ("weightless", "expected an adapter that can be loaded, got '{}': ", 0),
        (
            "pickle",
            "expected an adapter that can be loaded, got '{}' with a pickle that torch refuses to load, because it may hold code and not tensors "
            "alone (",
            0,
        ),
        ("incomplete", "expected an adapter that fits its base model '", 2),
        ("narrower", "expected an adapter that fits its base model '", 2),
    ],
)
def test_adapters_that_cannot_be_compared(
    files, tmp_path, capsys, monkeypatch, how, expected, loads
):
    """All but what only the layers show is refused before a model loads."""
    folder, load, seen = spoil(files, tmp_path / "adapter", how), loading.load_model, []
    monkeypatch.setattr(
        loading, "load_model", lambda *arguments: [seen.append(1), load(*arguments)][1]
    )
    capsys.readouterr()
    code, shown, said = cli_run(capsys, files.a, folder, "--text", files.text[1])
    line = said.splitlines()[-1]
    assert (code, shown, len(seen)) == (2, "", loads) and "Traceback" not in said
    assert (
        line.startswith("fastkl compare: error: MODEL_B: " + expected.format(folder))
        and "; remedy: " in line
    ), line


def test_without_peft_it_says_what_to_install(files, tmp_path, monkeypatch):
    folder = trained(files.a, tmp_path / "adapter")
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        CompareError,
        match="^MODEL_A: expected peft to be installed, for an adapter, got '.*' without it; remedy: pip install peft$",
    ):
        loading.load_config("MODEL_A", folder)


def test_a_whole_model_beside_an_adapter_config_is_the_model(files, tmp_path):
    """transformers loads such a folder as the model with the adapter in it; a config.json alone does not make a model."""
    folder = trained(files.a, tmp_path / "adapter")
    expected = compare(files, files.a, folder, tmp_path / "out", text=files.text[1:])[0]
    shutil.copy(f"{files.a}/config.json", folder)
    assert (
        compare(files, files.a, folder, tmp_path / "out", text=files.text[1:])[0].tobytes()
        == expected.tobytes()
    )
    shutil.copy(f"{files.a}/model.safetensors", folder)
    files.tokenizer.save_pretrained(folder)
    np.testing.assert_allclose(
        compare(files, files.a, folder, tmp_path / "out", text=files.text[1:])[0]["kl_ab"],
        expected["kl_ab"],
        atol=1e-6,
    )


def test_no_file_of_the_base_is_overwritten(files, tmp_path, capsys):
    folder = trained(files.a, tmp_path / "adapter")
    capsys.readouterr()
    code, shown, said = cli_run(
        capsys, files.b, folder, "--text", files.text[1], "--json", f"{files.a}/config.json"
    )
    assert (code, shown) == (
        2,
        "",
    ) and "error: --json: expected a file that has no other use, got '" in said


def test_an_adapter_on_the_hub_by_its_name(files, tmp_path, monkeypatch):
    """Base and adapter are in the cache, without a connection; neither is asked for again."""
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
    expected = compare(files, files.a, str(folders["adapter"]), tmp_path / "out")
    path = folders["adapter"] / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    values, result, _ = compare(files, "org/base", "org/adapter", tmp_path / "out")
    assert values.tobytes() == expected[0].tobytes()
    assert result["models"][1]["adapter"] == {"kind": "LORA", "base": "org/base"}
    with pytest.raises(CompareError, match="^MODEL_B: expected a model folder or a hub name, got "):
        loading.load_config("MODEL_B", "org/none")
