"""Loading models by name, and fresh checkpoints."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mimo_audio_hf import (
    MiMoAudioTokenizerConfig,
    MiMoAudioTokenizerFeatureExtractor,
    MiMoAudioTokenizerModel,
    checkpoints,
    decode_codes,
    encode_waveforms,
    load_audio,
)
from mimo_audio_hf.checkpoints import PRESETS, init_checkpoint, load_model
from mimo_audio_hf.metrics import stoi


SPEECH = Path(__file__).parent / "fixtures" / "audio" / "prompt_speech_en_m.wav"


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def refuses(model, fault: str, **options):
    """`load_model` refuses the model by its name, and says what is accepted."""
    return pytest.raises(ValueError, match=rf"(?s){re.escape(str(model))}.*{fault}")


# --- Fresh checkpoints ---


def test_a_fresh_checkpoint_has_all_files_and_loads(tiny_checkpoint):
    assert sorted(file.name for file in tiny_checkpoint.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    model = load_model(tiny_checkpoint, device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config.name_or_path == str(tiny_checkpoint)
    assert MiMoAudioTokenizerFeatureExtractor.from_pretrained(tiny_checkpoint).feature_size == model.config.n_mels


def test_the_tiny_preset_is_the_released_model_in_small(tiny_checkpoint):
    tiny, released = MiMoAudioTokenizerConfig(**PRESETS["tiny"]), MiMoAudioTokenizerConfig(**PRESETS["released"])
    for field in ("codebook_sizes", "sampling_rate", "hop_length", "nfft", "n_mels", "encoder_skip_layer_id"):
        assert getattr(tiny, field) == getattr(released, field)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in MiMoAudioTokenizerModel(released).parameters())
    assert 1.2e9 < parameters < 1.3e9


def test_the_seed_determines_the_weights_and_touches_no_generator(tiny_checkpoint, tmp_path):
    state = torch.get_rng_state()
    init_checkpoint(tmp_path / "same", "tiny", seed=0)
    init_checkpoint(tmp_path / "other", "tiny", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    expected = load_file(tiny_checkpoint / "model.safetensors")
    same = load_file(tmp_path / "same" / "model.safetensors")
    other = load_file(tmp_path / "other" / "model.safetensors")
    assert all(torch.equal(same[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(other["encoder.conv1.weight"], expected["encoder.conv1.weight"])


def test_the_weights_are_readable_as_other_files_are(tiny_checkpoint):
    modes = {file.stat().st_mode for file in tiny_checkpoint.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("present", ["config.json", "model.safetensors", "model-00001-of-00002.safetensors"])
def test_a_directory_with_a_checkpoint_is_refused(tmp_path, present):
    (tmp_path / present).write_text("precious")
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))} already holds a checkpoint \({present}\)"):
        init_checkpoint(tmp_path, "tiny")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [({"preset": "huge"}, "preset='huge'; accepted: 'released', 'tiny'"), ({"preset": "tiny", "seed": -1}, "seed=-1")],
)
def test_bad_arguments_write_nothing(tmp_path, arguments, fault):
    with pytest.raises(ValueError, match=fault):
        init_checkpoint(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


# --- Loading ---


def test_tiny_is_trained():
    """Speech that it never saw is intelligible, and no longer so with what is left of it in one codebook."""
    waveform = load_audio(SPEECH)
    model = load_model("tiny", device="cpu")
    assert (model.config.name_or_path, model.dtype, model.training) == ("tiny", torch.float32, False)
    (codes,) = encode_waveforms(model, [waveform])
    scores = [
        stoi(waveform, decode_codes(model, [codes[:, :books]])[0][: len(waveform)], 24000) for books in (1, 8, 20)
    ]
    assert scores[0] < scores[1] <= scores[2] + 0.01
    assert scores[2] > 0.9


def test_tiny_is_small_and_says_what_made_it():
    directory = Path(checkpoints.__file__).parent / "tiny"
    assert sum(file.stat().st_size for file in directory.iterdir()) <= 12e6
    preset = MiMoAudioTokenizerConfig(**PRESETS["tiny"]).to_dict()
    found = MiMoAudioTokenizerConfig.from_pretrained(directory).to_dict()
    assert {name: found[name] for name in PRESETS["tiny"]} == PRESETS["tiny"]
    assert {name for name in preset if preset[name] != found[name]} <= {
        "architectures",
        "dtype",
        "transformers_version",
    }
    training = json.loads((directory / "training.json").read_text())
    assert training["config"]["stage"] == 2
    assert "CC BY-SA 4.0" in (directory / "README.md").read_text()
    assert "Attribution-ShareAlike 4.0" in (directory / "LICENSE").read_text()
    assert "Allison Smith" in (directory / "NOTICE").read_text()


def test_device_dtype_and_attention_are_as_asked(tiny_checkpoint):
    model = load_model(tiny_checkpoint, device="cpu", dtype=torch.bfloat16, attn_implementation="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.attn_implementation == "eager"
    default = load_model(tiny_checkpoint)
    assert default.device.type == (
        "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    )


def test_a_dtype_may_be_given_by_name(tiny_checkpoint):
    assert load_model(tiny_checkpoint, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    for dtype in ("bfloat17", "nn", "int4", torch.int8):
        with pytest.raises(ValueError, match=f"dtype={dtype!r}; accepted: .*'bfloat16'"):
            load_model(tiny_checkpoint, device="cpu", dtype=dtype)


def test_a_loaded_model_is_returned_itself(tiny_checkpoint):
    model = load_model(tiny_checkpoint, device="cpu").train()
    assert load_model(model) is model
    assert model.training
    assert (model.device.type, model.dtype, model.attn_implementation) == ("cpu", torch.float32, "sdpa")
    moved = load_model(model, device="meta", dtype=torch.bfloat16, attn_implementation="eager")
    assert moved is model
    assert (model.device.type, model.dtype, model.attn_implementation) == ("meta", torch.bfloat16, "eager")


def test_the_tokenizer_of_a_language_models_directory(checkpoint, tmp_path):
    language_model = tmp_path / "mimo-v2"
    shutil.copytree(checkpoint, language_model / "audio_tokenizer")
    (language_model / "config.json").write_text(json.dumps({"model_type": "mimo_v2", "d_model": 7}))
    weights = language_model / "audio_tokenizer" / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(weights).items() if name.startswith("encoder.")}, weights)

    model = load_model(language_model, device="cpu")
    assert model.config.d_model == PRESETS["tiny"]["d_model"]
    assert model.decoder is None


def test_a_bare_config_as_upstream_has_it(checkpoint):
    fields = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(
        json.dumps({name: fields[name] for name in fields.keys() - {"model_type", "architectures"}})
    )
    assert load_model(checkpoint, device="cpu").config.d_model == PRESETS["tiny"]["d_model"]


def test_another_models_directory_is_refused(checkpoint):
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with refuses(checkpoint, "'qwen2' model; accepted: .*audio_tokenizer"):
        load_model(checkpoint)


@pytest.mark.parametrize("content", [None, "{}", "[1]"])
def test_a_directory_without_configuration_is_refused(checkpoint, content):
    (checkpoint / "config.json").unlink()
    if content is not None:
        (checkpoint / "config.json").write_text(content)
    with refuses(checkpoint, "no config.json; accepted: "):
        load_model(checkpoint)


def test_a_configuration_that_is_no_json_is_refused(checkpoint):
    (checkpoint / "config.json").write_text("{nope")
    with refuses(checkpoint, "not a valid JSON.* accepted: "):
        load_model(checkpoint)


def test_missing_weights_are_refused(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with refuses(checkpoint, "model.safetensors.* accepted: "):
        load_model(checkpoint)


def test_a_pickle_is_refused(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"anything")
    with refuses(checkpoint, "pytorch_model.bin is a pickle, which is never loaded"):
        load_model(checkpoint)


def test_truncated_weights_are_refused(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with refuses(checkpoint, "accepted: "):
        load_model(checkpoint)


@pytest.mark.parametrize(
    "name",
    ["nonsense", "no/such/folder", "./folder", "../folder", "/no/folder", "~/folder", "folder/", Path("a/b"), ""],
)
def test_what_is_no_directory_and_no_hub_id_is_not_looked_up(name, monkeypatch):
    def look_up(*_, **__):
        raise AssertionError("looked up")

    monkeypatch.setattr(MiMoAudioTokenizerModel, "from_pretrained", look_up)
    with refuses(name, "there is no such directory; accepted: 'tiny', a Hub id"):
        load_model(name)


def test_a_hub_id_that_cannot_be_reached_is_named():
    with refuses("nobody/nothing", "accepted: 'tiny', a Hub id"):
        load_model("nobody/nothing")


@pytest.mark.parametrize("device", ["abacus", "cuda:77"])
def test_a_device_that_is_not_there(tiny_model, device):
    for model in ("tiny", tiny_model):
        with pytest.raises(ValueError, match=f"device='{device}' is not available here; accepted: cpu"):
            load_model(model, device=device)


def test_an_attention_that_is_not_there(tiny_checkpoint, monkeypatch):
    with pytest.raises(ValueError, match="nonsense.*accepted: eager, sdpa"):
        load_model(tiny_checkpoint, device="cpu", attn_implementation="nonsense")

    def missing(*_, **__):
        raise ImportError("flash_attn is not installed")

    monkeypatch.setattr(MiMoAudioTokenizerModel, "set_attn_implementation", missing)
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2' .*flash_attn is not installed"):
        load_model(tiny_checkpoint, device="cpu", attn_implementation="flash_attention_2")
