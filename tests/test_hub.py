"""Hub repositories: that they load without the package and give the same, and that bad checkpoints are refused.

`python tests/test_hub.py` writes the files of `hub_card/` anew after a change of the card's template.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import card_problems
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization
from transformers.dynamic_module_utils import get_imports

import mimo_audio_hf
from mimo_audio_hf import (
    MiMoAudioTokenizerConfig,
    MiMoAudioTokenizerFeatureExtractor,
    MiMoAudioTokenizerModel,
    save_audio,
)
from mimo_audio_hf.checkpoints import TINY_DIRECTORY
from mimo_audio_hf.cli import main
from mimo_audio_hf.commands.hub import add_hub
from mimo_audio_hf.hub import assemble_hub_repository, overlay_files, push_to_hub


HUB_CARD = Path(__file__).parent.parent / "hub_card"
PACKAGE = Path(mimo_audio_hf.__file__).parent
MODEL_CODE = [f"{part}_mimo_audio_tokenizer.py" for part in ("configuration", "feature_extraction", "modeling")]
SAMPLES = 9600
PLACEHOLDER = '"path/or/name/of/this/repository"'

# The card's own example runs between the two; what it leaves behind goes into a file.
WITHOUT_THE_PACKAGE = """
import sys
import torch

sys.modules["mimo_audio_hf"] = None
torch.set_num_threads(THREADS)  # the results' last bits depend on it
"""
RECORD = """
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel

assert AutoConfig.from_pretrained(repository, trust_remote_code=True).model_type == "mimo_audio_tokenizer"
assert type(model).__module__.startswith("transformers_modules.")
assert type(AutoModel.from_pretrained(repository, trust_remote_code=True)) is type(model)
with torch.inference_mode():
    features = model.encode(**inputs, output_latents=True).latents
results = {"codes": audio_codes, "audio": audio_values, "latents": features, **inputs}
save_file({name: tensor.contiguous() for name, tensor in results.items()}, OUTPUT)
"""
SAVE = """
model.save_pretrained("saved")
feature_extractor.save_pretrained("saved")
"""


@pytest.fixture(scope="module")
def workplace(tiny_checkpoint, tmp_path_factory):
    """A folder with a clip, `speech.wav`, and the checkpoint's repository, `repository`."""
    folder = tmp_path_factory.mktemp("workplace")
    waveform = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(1)) * 0.1
    save_audio(folder / "speech.wav", waveform, 24000)
    assemble_hub_repository(tiny_checkpoint, folder / "repository")
    return folder


@pytest.fixture(scope="module")
def expected(workplace, tiny_model):
    """What the package's own classes give for the clip."""
    inputs = MiMoAudioTokenizerFeatureExtractor.from_config(tiny_model.config)(
        mimo_audio_hf.load_audio(workplace / "speech.wav"), sampling_rate=24000
    )
    with torch.inference_mode():
        encoded = tiny_model.encode(**inputs, output_latents=True)
        audio = tiny_model.decode(encoded.audio_codes).audio_values
    return {"codes": encoded.audio_codes, "audio": audio, "latents": encoded.latents, **inputs}


def card_examples(repository):
    """The card's two examples, without and with the package, for a repository at that path."""
    card = (repository / "README.md").read_text()
    return [
        code.replace(PLACEHOLDER, repr(str(repository))) for code in re.findall(r"```python\n(.*?)```", card, re.S)
    ]


def run_without_the_package(code, folder):
    """Runs code in an interpreter without the package and without the Hub."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    environment.pop("HF_MODULES_CACHE", None)
    script = WITHOUT_THE_PACKAGE.replace("THREADS", str(torch.get_num_threads())) + code
    result = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def remote(workplace):
    """What the repository's own code gives for the clip, run as its card says."""
    without_package, _ = card_examples(workplace / "repository")
    run_without_the_package(without_package + f'OUTPUT = "remote.safetensors"\n{RECORD}{SAVE}', workplace)
    return load_file(workplace / "remote.safetensors")


def test_the_package_is_out_of_reach(tmp_path):
    with pytest.raises(AssertionError, match="ModuleNotFoundError.*mimo_audio_hf"):
        run_without_the_package("import mimo_audio_hf", tmp_path)


def test_remote_code_gives_what_the_package_gives(remote, expected):
    assert remote.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(remote[name], tensor), name


def test_card_examples_write_the_clip(workplace, remote, monkeypatch):
    monkeypatch.chdir(workplace)
    from_remote = mimo_audio_hf.load_audio("decoded.wav")
    assert from_remote.shape == (SAMPLES,)
    _, with_package = card_examples(workplace / "repository")
    exec(with_package, {})
    torch.testing.assert_close(mimo_audio_hf.load_audio("decoded.wav"), from_remote, atol=2**-15, rtol=0)


def test_model_saved_by_remote_code_loads_again(workplace, remote, expected):
    saved = workplace / "saved"
    for name in MODEL_CODE:
        assert (saved / name).read_bytes() == (PACKAGE / name).read_bytes()
    without_package, _ = card_examples(workplace / "repository")
    code = without_package.replace(repr(str(workplace / "repository")), repr(str(saved)))
    run_without_the_package(code + f'OUTPUT = "again.safetensors"\n{RECORD}', workplace)
    for name, tensor in load_file(workplace / "again.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_auto_classes_with_the_package_trust_no_remote_code(workplace, expected):
    repository = workplace / "repository"
    assert type(AutoConfig.from_pretrained(repository)) is MiMoAudioTokenizerConfig
    assert type(AutoFeatureExtractor.from_pretrained(repository)) is MiMoAudioTokenizerFeatureExtractor
    for auto_class in (AutoModel, AutoModelForAudioTokenization):
        model = auto_class.from_pretrained(repository)
        assert type(model) is MiMoAudioTokenizerModel
        codes = model.encode(expected["input_features"], expected["attention_mask"]).audio_codes
        assert torch.equal(codes, expected["codes"])


@pytest.mark.parametrize("name", MODEL_CODE)
def test_model_code_stands_on_its_own(name, workplace):
    source = workplace / "repository" / name
    assert source.read_bytes() == (PACKAGE / name).read_bytes()
    # What transformers demands to be installed before it runs remote code, be it imported at the top or in a function.
    assert set(get_imports(source)) <= {"torch", "transformers", "torchaudio", "numpy"} | sys.stdlib_module_names
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and f"{node.module}.py" in MODEL_CODE, ast.unparse(node)


def test_upstreams_bare_configuration(tiny_checkpoint, tmp_path, expected):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model.safetensors").symlink_to(tiny_checkpoint / "model.safetensors")
    fields = json.loads((tiny_checkpoint / "config.json").read_text())
    for name in ("model_type", "architectures", "transformers_version", "has_decoder"):
        fields.pop(name)
    (bare / "config.json").write_text(json.dumps(fields))

    repository = assemble_hub_repository(bare, tmp_path / "new" / "repository")
    config = json.loads((repository / "config.json").read_text())
    assert {name: config[name] for name in fields} == fields
    assert config.keys() - fields.keys() == {"model_type", "architectures", "auto_map"}
    weights = repository / "model.safetensors"
    assert not weights.is_symlink() and weights.read_bytes() == (tiny_checkpoint / "model.safetensors").read_bytes()
    codes = AutoModel.from_pretrained(repository).encode(expected["input_features"]).audio_codes
    assert torch.equal(codes, expected["codes"])


def test_sharded_weights(tiny_model, tmp_path, expected):
    checkpoint = tmp_path / "checkpoint"
    tiny_model.save_pretrained(checkpoint, max_shard_size="4MB")
    shards = {path.name for path in checkpoint.glob("*.safetensors*")}
    assert len(shards) > 2
    repository = assemble_hub_repository(checkpoint, tmp_path / "repository")
    assert {path.name for path in repository.iterdir()} == shards | set(MODEL_CODE) | {
        "README.md",
        "config.json",
        "preprocessor_config.json",
    }
    codes = AutoModel.from_pretrained(repository).encode(expected["input_features"]).audio_codes
    assert torch.equal(codes, expected["codes"])


def test_encoder_only(tiny_checkpoint, tmp_path, expected):
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    save_file(kept | {"another.weight": torch.zeros(1)}, encoder / "model.safetensors", {"format": "pt"})
    (encoder / "config.json").write_text((tiny_checkpoint / "config.json").read_text())

    repository = assemble_hub_repository(encoder, tmp_path / "repository")
    card = ModelCard.load(repository / "README.md")
    assert "decode(" not in card.text and card.data.pipeline_tag == "feature-extraction"
    model = AutoModel.from_pretrained(repository)
    assert model.decoder is None
    assert torch.equal(model.encode(expected["input_features"]).audio_codes, expected["codes"])


def test_feature_extractor_follows_the_configuration():
    fields = {"sampling_rate": 16000, "n_mels": 64, "hop_length": 160, "nfft": 640, "window_size": 640}
    extractor = json.loads(overlay_files(fields)["preprocessor_config.json"])
    assert (extractor["sampling_rate"], extractor["feature_size"], extractor["hop_length"]) == (16000, 64, 160)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("encoder.conv1.bias"), "missing tensor encoder.conv1.bias"),
        (lambda tensors: tensors.update({"encoder.more": torch.zeros(1)}), "unexpected tensor encoder.more"),
        (
            lambda tensors: tensors.update({"decoder.layer_norm.bias": torch.zeros(5)}),
            r"decoder.layer_norm.bias has shape \(5,\) instead of \(128,\)",
        ),
    ],
)
def test_wrong_tensors_are_named(tiny_checkpoint, tmp_path, change, message):
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, wrong / "model.safetensors", {"format": "pt"})
    (wrong / "config.json").write_text((tiny_checkpoint / "config.json").read_text())
    with pytest.raises(ValueError, match=f"{wrong}.*{message}"):
        assemble_hub_repository(wrong, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"config\.json cannot be read"),
        ({"config.json": "{"}, r"config\.json cannot be read"),
        ({"config.json": "[]"}, r"config\.json holds a list"),
        ({"config.json": '{"ln_type": "BatchNorm"}', "model.safetensors": ""}, "ln_type='BatchNorm'"),
        ({"config.json": "{}"}, "no file named model.safetensors"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "pytorch_model.bin is a pickle"),
        ({"config.json": "{}", "model.safetensors": "\x80\x02"}, "accepted: weights in model.safetensors"),
    ],
)
def test_unreadable_checkpoints_are_refused(tmp_path, files, message):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for name, content in files.items():
        (checkpoint / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        assemble_hub_repository(checkpoint, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_only_an_empty_output_is_written_to(tiny_checkpoint, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    assert assemble_hub_repository(tiny_checkpoint, output) == output
    before = {path: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(ValueError, match="README.md exists"):
        assemble_hub_repository(tiny_checkpoint, output / "README.md")
    with pytest.raises(ValueError, match=f"{output} exists, and is not what .*model.safetensors"):
        assemble_hub_repository("tiny", output)
    (output / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"is not what is assembled of .* \(preprocessor_config.json\)"):
        assemble_hub_repository(tiny_checkpoint, output)
    before.pop(output / "preprocessor_config.json")
    (output / "modeling_mimo_audio_tokenizer.py").unlink()
    with pytest.raises(ValueError, match=f"{output} exists; accepted"):
        assemble_hub_repository(tiny_checkpoint, output)
    before.pop(output / "modeling_mimo_audio_tokenizer.py")
    assert {path: path.read_bytes() for path in output.iterdir()} == before


def test_what_was_assembled_of_the_same_checkpoint_is_left_as_it_is(tiny_checkpoint, tmp_path, capsys):
    output = assemble_hub_repository(tiny_checkpoint, tmp_path / "output")
    (output / "README.md").write_text("---\nlicense: mit\n---\n# My voices\n")
    before = {path: path.read_bytes() for path in output.iterdir()}
    assert main(["hub", str(tiny_checkpoint), str(output)]) == 0
    assert " (left as it was)" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in output.iterdir()} == before


def test_nothing_is_left_of_an_interrupted_copy(tiny_checkpoint, tmp_path, monkeypatch):
    def interrupted(*_):
        raise OSError("no space left")

    monkeypatch.setattr("mimo_audio_hf.hub.shutil.copyfileobj", interrupted)
    with pytest.raises(OSError, match="no space left"):
        assemble_hub_repository(tiny_checkpoint, tmp_path / "repository")
    assert not list((tmp_path / "repository").iterdir())


def test_command(tiny_checkpoint, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_hub(parser.add_subparsers())
    args = parser.parse_args(["hub", str(tiny_checkpoint), str(tmp_path / "repository")])
    args.run(args)
    printed = capsys.readouterr().out
    for path in (tmp_path / "repository").iterdir():
        assert path.name in printed
    args = parser.parse_args(["hub", str(tiny_checkpoint), str(tmp_path / "released"), "--released"])
    with pytest.raises(ValueError, match="d_model=128; accepted: 1280"):
        args.run(args)


def test_card_of_any_checkpoint_claims_nothing():
    released_fields = json.loads((HUB_CARD / "config.json").read_text())
    card = ModelCard(overlay_files(released_fields)["README.md"].decode())
    assert not {"license", "base_model"} & card.data.to_dict().keys()
    assert "PESQ" not in card.text and "XiaomiMiMo" not in card.text and "1.28 billion" not in card.text


def test_card_of_the_released_model():
    card = ModelCard.load(HUB_CARD / "README.md")  # checks the metadata's form
    metadata = card.data.to_dict()
    assert metadata["license"] == "mit"
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "audio-to-audio"
    assert metadata["base_model"] == "XiaomiMiMo/MiMo-Audio-Tokenizer"
    assert metadata["tags"]
    for part in ("measured none of them", "3.65 kbps; 1.55 kbps", "## Limitations", "## Licence", "2512.23808"):
        assert part in card.text
    assert "{%" not in card.content and "{{ " not in card.content


def training_document(stage=2, train_data="/home/me/voices", **config):
    """As a training run wrote it before it noted what came from the Hub."""
    from mimo_audio_hf.training.config import TrainingConfig

    options = TrainingConfig(output_dir="run", stage=stage, train_data=train_data, **config)
    return {
        "config": dataclasses.asdict(options),
        "processes": 2,
        "mixed_precision": "bf16",
        "device": "a GPU",
        "versions": {"torch": "2.11"},
        "data": {
            "train": {"clips": 123, "seconds": 7200.0, "skipped": {"bad.wav": "silent"}, "fingerprint": "f" * 64},
            "validation": None,
        },
        "step": 777,
        "metrics": {"stoi": 0.912345, "codebook_use/0": 0.5},
    }


def test_card_of_a_training_run(tiny_checkpoint, tmp_path):
    checkpoint = tmp_path / "checkpoint-777"
    shutil.copytree(tiny_checkpoint, checkpoint)
    (checkpoint / "training.json").write_text(json.dumps(training_document()))
    repository = assemble_hub_repository(checkpoint, tmp_path / "repository")
    card = ModelCard.load(repository / "README.md")
    assert card.data.base_model == "XiaomiMiMo/MiMo-Audio-Tokenizer"
    for part in (
        "777 steps of stage 2",
        "codes are those of that model",
        "| train | voices | 123 | 2.000 | 1 |",
        "| `learning_rate` | 0.0001 |",
        "| `feature_matching_weight` | 2.0 |",
        "| stoi | 0.9123 |",
        "| torch | 2.11 |",
    ):
        assert part in card.text
    assert "Nothing is said here" not in card.text and "/home/me" not in card.content
    assert "{%" not in card.content and "{{ " not in card.content
    files = {path.name for path in repository.iterdir()}
    assert files == {*MODEL_CODE, "README.md", "config.json", "preprocessor_config.json", "model.safetensors"}
    with pytest.raises(ValueError, match="a training run made its weights"):
        assemble_hub_repository(checkpoint, tmp_path / "other", released=True)

    document = training_document(stage=1, model=str(tiny_checkpoint)) | {"metrics": {}}
    del document["config"]["mel_scales"]  # of a run from before the option
    (checkpoint / "training.json").write_text(json.dumps(document))
    card = ModelCard.load(assemble_hub_repository(checkpoint, tmp_path / "stage1") / "README.md")
    assert "base_model" not in card.data.to_dict() and str(tiny_checkpoint.parent) not in card.content
    assert "its codes are its own" in card.text and "was not validated at this step" in card.text
    assert "| `audio_to_text_weight` | 10.0 |" in card.text and "`adversarial_weight`" not in card.text
    assert "mel_scales" not in card.text
    (checkpoint / "training.json").write_text('{"config": {"model": "tiny"}}')
    with pytest.raises(ValueError, match="training.json: .*accepted: what a training run writes"):
        assemble_hub_repository(checkpoint, tmp_path / "damaged")
    (checkpoint / "training.json").write_text('{"step": 1}')
    with pytest.raises(ValueError, match="training.json: config.model is missing; accepted: str"):
        assemble_hub_repository(checkpoint, tmp_path / "damaged")


@pytest.mark.parametrize(
    ("from_hub", "expected"),
    [
        (["model", "train_data"], {"base_model": "voices/base", "datasets": ["voices/speech"]}),
        ([], {}),
        # Noted by no run from before, of which a name cannot tell.
        (None, {}),
    ],
)
def test_card_names_what_came_from_the_hub(tiny_checkpoint, tmp_path, from_hub, expected):
    """And not what lay at a relative path that looks like a name on the Hub."""
    checkpoint = tmp_path / "checkpoint-777"
    shutil.copytree(tiny_checkpoint, checkpoint)
    document = training_document(model="voices/base", train_data="voices/speech")
    if from_hub is not None:
        document["from_hub"] = from_hub
    (checkpoint / "training.json").write_text(json.dumps(document))
    card = ModelCard.load(assemble_hub_repository(checkpoint, tmp_path / "repository") / "README.md")
    metadata = card.data.to_dict()
    assert {name: metadata[name] for name in ("base_model", "datasets") if name in metadata} == expected
    assert ("voices/base" in card.text, "voices/speech" in card.text) == (bool(expected), bool(expected))
    assert "| train | " in card.text and "speech | 123 |" in card.text
    assert card_problems(card.content) == []


def test_the_licence_goes_along(tmp_path):
    repository = assemble_hub_repository("tiny", tmp_path / "repository")
    for name in ("LICENSE", "NOTICE"):
        assert (repository / name).read_bytes() == (TINY_DIRECTORY / name).read_bytes()


def test_a_checkpoints_own_card_is_kept(tmp_path):
    own = ModelCard.load(TINY_DIRECTORY / "README.md")
    card = ModelCard.load(assemble_hub_repository("tiny", tmp_path / "repository") / "README.md")
    assert card.data.to_dict() == own.data.to_dict()
    assert card.text.strip().startswith(own.text.strip())
    assert card.text.count("## Use\n") == 1 and "trust_remote_code=True" in card.text
    # Not twice, where the card says it already; and what it lacks for the Hub is added.
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(TINY_DIRECTORY, checkpoint)
    text = "# Mine\n\nLoads with `trust_remote_code=True`."
    (checkpoint / "README.md").write_text(f"---\nlanguage: [de]\ntags: [mine]\n---\n{text}\n")
    card = ModelCard.load(assemble_hub_repository(checkpoint, tmp_path / "mine") / "README.md")
    assert card.text.strip() == text
    assert card.data.language == ["de"] and card.data.tags == ["mine"]
    assert card.data.pipeline_tag == "audio-to-audio" and card.data.license_name == "see-license-file"


def test_card_of_rounded_weights(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    for name in ("config.json", "model.safetensors", "training.json", "LICENSE"):
        shutil.copy(TINY_DIRECTORY / name, tmp_path / "checkpoint")
    card = ModelCard.load(assemble_hub_repository(tmp_path / "checkpoint", tmp_path / "repository") / "README.md")
    assert "The weights are under see-license-file: [LICENSE](LICENSE)." in card.text
    assert "rounded to float16" in card.text and "bit for bit" not in card.text


@pytest.mark.parametrize(
    ("own_card", "expected"),
    [
        (None, {"license": "other", "license_name": "see-license-file", "license_link": "LICENSE"}),
        (
            "---\nlanguage: en\n---\n",
            {"license": "other", "license_name": "see-license-file", "license_link": "LICENSE"},
        ),
        ("---\nlicense: cc-by-4.0\n---\n", {"license": "cc-by-4.0"}),
        (
            "---\nlicense: other\nlicense_name: voice-owners\nlicense_link: https://example.org/terms\n---\n",
            {"license": "other", "license_name": "voice-owners", "license_link": "https://example.org/terms"},
        ),
    ],
)
def test_the_licence_in_the_card(tiny_checkpoint, tmp_path, own_card, expected):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    (checkpoint / "LICENSE").write_text("Terms.")
    if own_card is not None:
        (checkpoint / "README.md").write_text(own_card)
    card = ModelCard.load(assemble_hub_repository(checkpoint, tmp_path / "repository") / "README.md")
    assert expected.items() <= card.data.to_dict().items()
    assert card_problems(card.content) == []
    link = f": [{expected['license_link']}]" if "license_link" in expected else "."
    assert f"The weights are under {expected.get('license_name', expected['license'])}{link}" in card.text


def test_a_damaged_card_is_named(tiny_checkpoint, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    (checkpoint / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match=r"(?s)README\.md: .*accepted: a model card, or none"):
        assemble_hub_repository(checkpoint, tmp_path / "repository")


def test_cards_pass_the_documented_rules_of_the_hub(tiny_checkpoint, tmp_path):
    """The Hub's own check cannot be run without it: these are the rules that its documentation states."""
    released, tiny = HUB_CARD / "README.md", PACKAGE / "tiny" / "README.md"
    trained = tmp_path / "checkpoint-777"
    shutil.copytree(tiny_checkpoint, trained)
    (trained / "training.json").write_text(json.dumps(training_document()))
    repositories = [
        assemble_hub_repository(checkpoint, tmp_path / name)
        for name, checkpoint in (("any", tiny_checkpoint), ("tiny", tiny.parent), ("trained", trained))
    ]
    for card in (released, tiny, *(repository / "README.md" for repository in repositories)):
        assert card_problems(card.read_text()) == [], card


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ("license: gratis", '"license" is'),
        ("license: other", "needs license_name and license_link"),
        ("base_model: ./a/b/c", '"base_model" is'),
        ("pipeline_tag: audio", '"pipeline_tag" is'),
        ("tags: audio", '"tags" is'),
        ("language: [English]", '"language" is'),
        ("licence: mit", '"licence" is unknown'),
        ("- a list", "should be a dict"),
        ("# nothing", "no metadata"),
    ],
)
def test_the_rules_find_what_is_wrong(metadata, problem):
    (found,) = card_problems(f"---\n{metadata}\n---\n# A model\n")
    assert problem in found


@pytest.mark.parametrize("option", [["--private"], ["--revision", "next"]])
def test_command_refuses_what_only_a_push_heeds(tiny_checkpoint, tmp_path, capsys, option):
    assert main(["hub", str(tiny_checkpoint), str(tmp_path / "repository"), *option]) == 1
    assert f"{option[0]} without --push; accepted: --push OWNER/NAME" in capsys.readouterr().err
    assert not (tmp_path / "repository").exists()


def test_command_refuses_a_bad_name_before_it_writes(tiny_checkpoint, tmp_path, capsys):
    assert main(["hub", str(tiny_checkpoint), str(tmp_path / "repository"), "--push", "mine"]) == 1
    assert "repo_id='mine'; accepted: owner/name" in capsys.readouterr().err
    assert not (tmp_path / "repository").exists()


def test_an_assembled_repository_has_its_card_already(tiny_checkpoint, tmp_path):
    repository = assemble_hub_repository(tiny_checkpoint, tmp_path / "repository")
    with pytest.raises(ValueError, match="repository is assembled already; accepted: released=False"):
        push_to_hub(repository, "me/mine", released=True)
    with pytest.raises(ValueError, match="repo_id='me/mine': .*offline mode"):  # as tests are
        push_to_hub(repository, "me/mine")
    (repository / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{repository}: .*accepted: weights in model.safetensors"):
        push_to_hub(repository, "me/mine")


def test_hub_card_is_what_is_assembled():
    renew = "run `python tests/test_hub.py` to write hub_card/ anew"
    written = released_overlay()
    for name in ("config.json", "preprocessor_config.json"):
        assert json.loads((HUB_CARD / name).read_text()) == json.loads(written[name]), renew
    card, expected = ModelCard.load(HUB_CARD / "README.md"), ModelCard(written["README.md"].decode())
    assert card.text == expected.text and card.data.to_dict() == expected.data.to_dict(), renew


def test_hub_card_has_the_released_configuration():
    fields = json.loads((HUB_CARD / "config.json").read_text())
    code = "modeling_mimo_audio_tokenizer.MiMoAudioTokenizerModel"
    assert fields.pop("model_type") == "mimo_audio_tokenizer"
    assert fields.pop("architectures") == ["MiMoAudioTokenizerModel"]
    assert fields.pop("auto_map") == {
        "AutoConfig": "configuration_mimo_audio_tokenizer.MiMoAudioTokenizerConfig",
        "AutoFeatureExtractor": "feature_extraction_mimo_audio_tokenizer.MiMoAudioTokenizerFeatureExtractor",
        "AutoModel": code,
        "AutoModelForAudioTokenization": code,
    }
    default = MiMoAudioTokenizerConfig()
    assert fields == {name: getattr(default, name) for name in fields}
    # Upstream's file has the sizes of all parts, and none of the fields of MiMo-V2's encoders or of this package.
    assert len(fields) == 40 and not {"hybrid_attention", "initializer_range", "has_decoder"} & fields.keys()


def released_overlay():
    """hub_card/ as it should be; the released configuration is the one thing in it that is not derived."""
    fields = json.loads((HUB_CARD / "config.json").read_text())
    overlay = overlay_files(fields, released=True)
    return {name: content for name, content in overlay.items() if name not in MODEL_CODE}


if __name__ == "__main__":
    for file_name, file_content in released_overlay().items():
        (HUB_CARD / file_name).write_bytes(file_content)
