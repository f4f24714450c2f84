"""Codes for language models: delays, batches on the fly and stored, and the example that trains on them."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from mimo_audio_hf import (
    MiMoAudioTokenizerConfig,
    MiMoAudioTokenizerModel,
    encode_waveforms,
    inference,
    language_model,
    load_audio,
    load_model,
)
from mimo_audio_hf.checkpoints import PRESETS
from mimo_audio_hf.cli import main
from mimo_audio_hf.language_model import IGNORED, AudioCodesCollator, delay_codes, undelay_codes


ROOT = Path(__file__).parent.parent
RECORDING = ROOT / "tests" / "fixtures" / "audio" / "prompt_speech_en_m.wav"
RECIPE = ROOT / "recipes" / "language_model" / "train.py"


@pytest.fixture(scope="module")
def model():
    return load_model("tiny", device="cpu").freeze()


@pytest.fixture(scope="module")
def clips():
    return [clip.clone() for clip in load_audio(RECORDING)[:80_000].split([30_000, 4000, 46_000])]


def test_delays():
    codes = torch.tensor([[1, 2, 3], [4, 5, 6]])
    delayed = delay_codes(codes, [90, 91, 92])
    assert delayed.tolist() == [[1, 91, 92], [4, 2, 92], [90, 5, 3], [90, 91, 6]]
    assert torch.equal(undelay_codes(delayed), codes)
    delayed = delay_codes(codes, [90, 91, 92], delays=[1, 0, 1])
    assert delayed.tolist() == [[90, 2, 92], [1, 5, 3], [4, 91, 6]]
    assert torch.equal(undelay_codes(delayed, [1, 0, 1]), codes)


def test_delays_within_patches():
    codes = torch.randint(100, (12, 8), generator=torch.Generator().manual_seed(0))
    patches = codes.unflatten(0, (-1, 4))
    delayed = delay_codes(patches, [100] * 8)
    assert delayed.shape == (3, 11, 8)
    for patch, expected in zip(delayed, patches, strict=True):
        assert torch.equal(patch, delay_codes(expected, [100] * 8))
    assert torch.equal(undelay_codes(delayed).flatten(0, 1), codes)


def test_bad_delays():
    codes = torch.zeros(5, 3, dtype=torch.long)
    for call, message in (
        (lambda: delay_codes(codes, [1, 1]), "empty=.* for 3 codebooks"),
        (lambda: delay_codes(codes, [1, 1, 1], [0, 1]), r"delays=\[0, 1\] for 3 codebooks"),
        (lambda: delay_codes(codes, [1, 1, 1], [0, -1, 0]), r"delays=\[0, -1, 0\]"),
        (lambda: undelay_codes(codes[:1]), "1 steps with delays"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_batches_hold_the_delayed_codes_of_each_clip(model, clips):
    batch = AudioCodesCollator(model)([{"audio": clip} for clip in clips])
    codes = encode_waveforms(model, clips, 8)
    empty = torch.tensor([1024, 1024, *[128] * 6])
    frames = [len(each) for each in codes]
    assert batch["input_ids"].shape == (3, 1 + max(frames) + 7, 8)
    for clip, expected in enumerate(codes):
        length = 1 + len(expected) + 7
        ids = batch["input_ids"][clip]
        assert torch.equal(ids[0], empty)
        assert torch.equal(undelay_codes(ids[1:length]), expected)
        assert (ids[length:] == empty).all()
        assert batch["attention_mask"][clip].tolist() == [1] * length + [0] * (len(ids) - length)
        labels = batch["labels"][clip]
        assert (labels != IGNORED).sum() == expected.numel()
        assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])
        assert (ids[labels == IGNORED] == empty.expand_as(ids)[labels == IGNORED]).all()


def test_stored_codes_give_the_batch_of_their_audio(model, clips):
    codes = encode_waveforms(model, clips)
    on_the_fly = AudioCodesCollator(model)([{"audio": clip} for clip in clips])
    stored = AudioCodesCollator(model.config)([{"audio_codes": each.numpy().astype(np.int16)} for each in codes])
    mixed = AudioCodesCollator(model)(
        [
            {"audio": {"array": clips[0].numpy(), "sampling_rate": 24000}},
            {"audio_codes": codes[1].tolist(), "audio": None},
            {"audio": clips[2]},
        ]
    )
    for name, expected in on_the_fly.items():
        assert torch.equal(stored[name], expected)
        assert torch.equal(mixed[name], expected)


def test_patches_as_mimo_audio_has_them(model, clips):
    batch = AudioCodesCollator(model, patch_frames=4)([{"audio": clip} for clip in clips])
    codes = encode_waveforms(model, clips, 8)
    empty = torch.tensor([1024, 1024, *[128] * 6])
    patches = [-(-len(each) // 4) for each in codes]
    assert any(len(each) % 4 for each in codes)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 1 + max(patches), 4 + 7, 8)
    assert batch["attention_mask"].shape == (3, 1 + max(patches))
    for clip, expected in enumerate(codes):
        ids, labels = batch["input_ids"][clip], batch["labels"][clip]
        assert (ids[0] == empty).all()
        assert (ids[1 + patches[clip] :] == empty).all()
        frames = undelay_codes(ids[1 : 1 + patches[clip]]).flatten(0, 1)
        assert torch.equal(frames[: len(expected)], expected)
        assert (frames[len(expected) :] == empty).all()
        # Of a patch's step t, codebook q is the code of the patch's frame t - q.
        assert ids[1, 3, 2] == expected[1, 2]
        assert ids[1, 3, 4] == empty[4]
        assert batch["attention_mask"][clip].sum() == 1 + patches[clip]
        assert (labels != IGNORED).sum() == expected.numel()
        assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])


def test_clips_of_more_than_a_minute_have_the_codes_of_their_pieces(model, clips, monkeypatch):
    for module in (language_model, inference):
        monkeypatch.setattr(module, "MAX_PIECE_FRAMES", 100)  # a second
    ids = AudioCodesCollator(model)([{"audio": clip} for clip in clips])["input_ids"]
    codes = encode_waveforms(model, clips, 8)
    whole = language_model.encode_packed(model, clips[2], [len(clips[2])], 8)
    assert not torch.equal(codes[2], whole), "the pieces' codes are others"
    for clip, expected in zip(ids, codes, strict=True):
        assert torch.equal(undelay_codes(clip[1 : 1 + len(expected) + 7]), expected)


def test_not_all_clips_run_at_once(model, clips, monkeypatch):
    calls = []
    packed = language_model.encode_packed

    def spy(model, samples, lengths, num_quantizers):
        calls.append(lengths)
        return packed(model, samples, lengths, num_quantizers)

    expected = AudioCodesCollator(model)([{"audio": clip} for clip in clips])
    monkeypatch.setattr(language_model, "encode_packed", spy)
    monkeypatch.setattr(language_model, "MAX_BATCH_SECONDS", 2.0)
    batch = AudioCodesCollator(model)([{"audio": clip} for clip in clips])
    assert calls == [[30_000, 4000], [46_000]]
    assert torch.equal(batch["input_ids"], expected["input_ids"])


def test_tokenizers_by_name(model, clips):
    collator = AudioCodesCollator("tiny")
    assert not any(parameter.requires_grad for parameter in collator.model.parameters())
    expected = AudioCodesCollator(model)([{"audio": clips[0]}])
    assert torch.equal(collator([{"audio": clips[0]}])["input_ids"].cpu(), expected["input_ids"])
    assert AudioCodesCollator(model, np.int64(3), delays=np.arange(3)).vocabulary_sizes == [1025, 1025, 129]


def test_bad_arguments(model):
    for arguments, message in (
        ({"num_quantizers": 21}, "num_quantizers=21; accepted: an integer, 1 to 20"),
        ({"num_quantizers": 8.0}, "num_quantizers=8.0; accepted: an integer, 1 to 20"),
        ({"num_quantizers": True}, "num_quantizers=True; accepted: an integer"),
        ({"delays": [0, 1]}, r"delays=\[0, 1\] for 8 codebooks"),
        ({"delays": [0.5] * 8}, r"delays=\[0.5, .*\] for 8 codebooks; accepted: an integer from 0"),
        ({"delays": [False] * 8}, r"delays=\[False, .*\] for 8 codebooks; accepted: an integer from 0"),
        ({"patch_frames": 0}, "patch_frames=0; accepted: an integer, 1 or more"),
        ({"patch_frames": 4.0}, "patch_frames=4.0; accepted: an integer, 1 or more"),
        ({"tokenizer": 3}, "tokenizer is a int; accepted: a MiMoAudioTokenizerModel"),
        ({"tokenizer": "no such"}, "model='no such'"),
    ):
        with pytest.raises(ValueError, match=message):
            AudioCodesCollator(**{"tokenizer": model, **arguments})


def test_bad_examples(model, clips):
    collator = AudioCodesCollator(model)
    for example, message in (
        ({}, "audio of example 1: no audio_codes, and without audio"),
        ({"audio": torch.zeros(0)}, "audio of example 1 .*not empty"),
        ({"audio": "missing.wav"}, "audio of example 1: .*missing.wav"),
        ({"audio_codes": torch.zeros(5, 7, dtype=torch.long)}, "example 1 are of 7 codebooks; accepted: 8 or more"),
        ({"audio_codes": torch.full((5, 8), 128)}, "example 1.*128 for codebook 2"),
    ):
        with pytest.raises(ValueError, match=message):
            collator([{"audio": clips[0]}, example])
    with pytest.raises(ValueError, match="audio of example 0: .* without a tokenizer"):
        AudioCodesCollator(model.config)([{"audio": clips[0]}])
    with pytest.raises(ValueError, match="no examples; accepted: one or more"):
        collator([])


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    """accelerate keeps one mixed precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(RECIPE))


def test_the_example_learns_on_the_fly_and_from_stored_codes(recipe, tmp_path, write_audio):
    options = ["--tokenizer", "tiny", "--steps", "30", "--batch-size", "2", "--seconds", "1", "--workers", "0"]
    options += ["--hidden-size", "64", "--layers", "1", "--learning-rate", "0.01"]
    train, parse = recipe["train"], recipe["parse_arguments"]
    losses = train(parse(["--audio", str(RECORDING), str(RECORDING), *options]))["losses"]
    assert sum(losses[-5:]) < sum(losses[:5]) - 5
    assert main(["tokenize", str(RECORDING.parent), str(tmp_path), "--model", "tiny", "--device", "cpu"]) == 0
    losses = train(parse(["--codes", str(tmp_path), *options]))["losses"]
    assert sum(losses[-5:]) < sum(losses[:5]) - 5


@pytest.mark.parametrize("source", ["audio", "codes"])
def test_the_example_saves_its_model_and_what_it_says(recipe, tmp_path, source, capsys):
    options = ["--tokenizer", "tiny", "--steps", "1", "--batch-size", "1", "--seconds", "0.8", "--workers", "0"]
    options += ["--hidden-size", "64", "--layers", "1", "--output-dir", str(tmp_path / "new" / "trained")]
    arguments = ["--audio", str(RECORDING)]
    if source == "codes":
        tokens = str(tmp_path / "tokens")
        assert main(["tokenize", str(RECORDING.parent), tokens, "--model", "tiny", "--device", "cpu"]) == 0
        arguments = ["--codes", tokens]
    recipe["train"](recipe["parse_arguments"]([*arguments, *options]))
    trained = tmp_path / "new" / "trained"
    audio, rate = soundfile.read(trained / "generated.wav")
    assert (audio.shape, rate) == ((20 * 960,), 24000)
    assert np.abs(audio).max() > 1e-3
    config = recipe["LlamaConfig"].from_pretrained(trained)
    model = recipe["AudioLanguageModel"]([1025, 1025, *[129] * 6], config)
    model.load_state_dict(load_file(trained / "model.safetensors"))
    assert f"generated {trained / 'generated.wav'}" in capsys.readouterr().out


def test_the_example_does_not_train_what_cannot_speak(recipe, tmp_path):
    folder = tmp_path / "encoder"
    MiMoAudioTokenizerModel(MiMoAudioTokenizerConfig(**PRESETS["tiny"], has_decoder=False)).save_pretrained(folder)
    arguments = ["--audio", str(RECORDING), "--tokenizer", str(folder), "--output-dir", str(tmp_path / "trained")]
    with pytest.raises(ValueError, match="--output-dir: .*encoder only"):
        recipe["train"](recipe["parse_arguments"](arguments))
    assert not (tmp_path / "trained").exists()


def test_the_example_generates_what_it_was_trained_to(recipe):
    """Each codebook by its delay, from the steps that the collator makes; here always the likeliest."""
    torch.manual_seed(0)
    model = recipe["AudioLanguageModel"]([6, 5, 4], recipe["transformer_config"](64, 1)).eval()
    torch.nn.init.normal_(model.head.weight, std=1e3)
    for delays in ([0, 1, 2], [1, 0, 3]):
        frames = list(recipe["generate"](model, delays, 9))
        assert [frame.shape for frame in frames] == [(1, 3)] * 9
        delayed = delay_codes(torch.cat(frames), [5, 4, 3], delays)
        steps = torch.cat([torch.tensor([[5, 4, 3]]), delayed])
        with torch.no_grad():
            logits = model.logits(steps[None])
        for book, delay in enumerate(delays):
            likeliest = logits[book][0, :-1, :-1].argmax(-1)
            assert torch.equal(likeliest[delay : delay + 9], delayed[delay : delay + 9, book])


def test_the_example_reads_no_more_of_a_file_than_it_takes(recipe, tmp_path, monkeypatch):
    samples = np.arange(30_000, dtype=np.int16)
    soundfile.write(tmp_path / "long.wav", np.stack([samples, samples + 2], axis=1), 24000)
    read, counts = soundfile.SoundFile.read, []
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda *args, **options: counts.append(args[1]) or read(*args, **options)
    )
    starts = set()
    for _ in range(5):
        crop = recipe["read_crop"](str(tmp_path / "long.wav"), 0.1, 24000) * 2**15
        starts.add(int(crop[0]))
        torch.testing.assert_close(crop, crop[0] + torch.arange(2400))  # the mean of both channels
    assert len(starts) > 1
    assert counts == [2400] * 5
    assert len(recipe["read_crop"](str(tmp_path / "long.wav"), 1, 12000)) == 12000
    assert len(recipe["read_crop"](str(tmp_path / "long.wav"), 9, 24000)) == 30_000


def test_the_examples_tokenizer_stays_as_it_is(recipe, monkeypatch):
    loaded = []
    monkeypatch.setitem(
        recipe["train"].__globals__,
        "load_model",
        lambda *args, **options: loaded.append(load_model(*args, **options)) or loaded[0],
    )
    arguments = [
        "--audio",
        str(RECORDING),
        "--tokenizer",
        "tiny",
        "--steps",
        "2",
        "--batch-size",
        "1",
        "--workers",
        "0",
    ]
    recipe["train"](recipe["parse_arguments"]([*arguments, "--hidden-size", "64", "--layers", "1", "--seconds", "1"]))
    [tokenizer] = loaded
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    assert not tokenizer.training
    for name, tensor in load_model("tiny", device="cpu").state_dict().items():
        assert torch.equal(tokenizer.state_dict()[name], tensor), name


# The example, noting which recordings each process sees, and a sum of its model's parameters at the end.
NOTING = """
import hashlib, os, runpy, sys
from pathlib import Path

recipe = runpy.run_path(sys.argv[1])
scope, read = recipe["train"].__globals__, recipe["read_crop"]
notes = Path(sys.argv[2], os.environ["RANK"])

def noting(path, *args):
    with notes.open("a") as file:
        print(path, file=file)
    return read(path, *args)

class Noting(recipe["Accelerator"]):
    def free_memory(self, model, *others):
        parameters = b"".join(each.detach().numpy().tobytes() for each in model.parameters())
        notes.with_suffix(".sum").write_text(hashlib.sha256(parameters).hexdigest())
        return super().free_memory(model, *others)

scope["read_crop"], scope["Accelerator"] = noting, Noting
losses = recipe["train"](recipe["parse_arguments"](sys.argv[3:]))["losses"]
assert len(losses) == 2
"""


def test_the_example_in_two_processes_shares_the_recordings_out(tmp_path, write_audio):
    paths = [str(write_audio(tmp_path / f"{number}.wav", 9600)) for number in range(4)]
    (tmp_path / "noting.py").write_text(NOTING)
    (tmp_path / "seen").mkdir()
    arguments = ["--tokenizer", "tiny", "--steps", "2", "--batch-size", "1", "--workers", "0", "--seconds", "1"]
    arguments += ["--hidden-size", "64", "--layers", "1", "--output-dir", str(tmp_path / "trained"), "--audio", *paths]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(tmp_path / "noting.py"), str(RECIPE), str(tmp_path / "seen"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # (That they end is part of it: the model is to be freed before the processes part.)
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert run.returncode == 0, run.stderr
    first, second = ((tmp_path / "seen" / rank).read_text().split() for rank in "01")
    assert sorted(first + second) == sorted(paths)
    # Gradients are shared, too: each process has seen others of the recordings, and has the same model.
    first, second = ((tmp_path / "seen" / f"{rank}.sum").read_text() for rank in "01")
    assert first == second
    assert soundfile.info(tmp_path / "trained" / "generated.wav").frames == 24000


def test_the_examples_model_sees_nothing_of_later_steps(recipe):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = recipe["LlamaConfig"](**sizes, vocab_size=1, bos_token_id=None, eos_token_id=None)
    model = recipe["AudioLanguageModel"]([5, 4], config).eval()
    ids = torch.randint(4, (1, 9, 2))
    ones = torch.ones(1, 9, dtype=torch.long)

    def losses(ids: torch.Tensor, step: int) -> torch.Tensor:
        """Of each codebook, of predicting one step."""
        labels = torch.full_like(ids, IGNORED)
        labels[:, step] = 1
        return model(ids, ones, labels)[1]

    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 4
    torch.testing.assert_close(losses(changed, 5), losses(ids, 5))
    assert not torch.allclose(losses(changed, 6), losses(ids, 6))
