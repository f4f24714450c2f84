"""The command `mimo-audio`."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import save_file

from mimo_audio_hf import MiMoAudioTokenizerConfig, MiMoAudioTokenizerModel, load_audio
from mimo_audio_hf.checkpoints import PRESETS, init_checkpoint
from mimo_audio_hf.cli import main
from mimo_audio_hf.codes import AudioCodes
from mimo_audio_hf.commands import files
from mimo_audio_hf.inference import decode_codes, encode_waveforms


SPEECH = Path(__file__).parent / "fixtures" / "audio" / "prompt_speech_en_m.wav"


@pytest.fixture
def run(tiny_checkpoint, capsys):
    """Runs a command with the tiny model on the CPU; gives exit status, lines of stdout and lines of stderr."""

    def run(command, *arguments, model=tiny_checkpoint):
        placement = ["--model", str(model), "--device", "cpu"] if command in ("encode", "decode", "roundtrip") else []
        try:
            status = main([command, *map(str, arguments), *placement])
        except SystemExit as exit:
            status = exit.code
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return run


@pytest.fixture
def audio(tmp_path, write_audio) -> Path:
    """A folder with three clips, one of them in a subfolder, and a file that is not audio."""
    folder = tmp_path / "audio"
    write_audio(folder / "a.wav", 5000, seed=1)
    write_audio(folder / "b.flac", 12345, seed=2)
    write_audio(folder / "sub" / "a.WAV", 2400, seed=3)
    (folder / "notes.txt").write_text("not audio")
    return folder


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- encode ---


def test_encode_a_file(run, audio, tmp_path, tiny_model, tiny_checkpoint):
    status, out, err = run("encode", audio / "b.flac", "-o", tmp_path / "codes.safetensors")
    assert (status, err) == (0, [])
    assert len(out) == 1
    assert out[0].startswith("encoded 1 of 1 clip, 0.51 s of audio in ")
    assert out[0].endswith(f"-> {tmp_path / 'codes.safetensors'}")

    codes = AudioCodes.load(tmp_path / "codes.safetensors")
    assert torch.equal(codes.codes, encode_waveforms(tiny_model, [load_audio(audio / "b.flac")])[0])
    assert (codes.num_samples, codes.sampling_rate, codes.model) == (12345, 24000, str(tiny_checkpoint))


def test_encode_a_folder_keeps_its_layout(run, audio, tmp_path):
    status, out, err = run("encode", audio, "-o", tmp_path / "codes", "--batch-seconds", "0.1")
    assert (status, err) == (0, [])
    assert out[0].startswith(f"encoded 3 of 3 clips, {(5000 + 12345 + 2400) / 24000:.2f} s of audio in ")
    assert files_in(tmp_path / "codes") == ["a.safetensors", "b.safetensors", "sub/a.safetensors"]

    # Together, in batches, and each alone: the same codes, each in its own file.
    for name in ("a.wav", "b.flac", "sub/a.WAV"):
        alone = tmp_path / "alone.safetensors"
        assert run("encode", audio / name, "-o", alone)[0] == 0
        together = AudioCodes.load((tmp_path / "codes" / name).with_suffix(".safetensors"))
        assert torch.equal(together.codes, AudioCodes.load(alone).codes)
        assert together.num_samples == AudioCodes.load(alone).num_samples


def test_encode_files_and_folders_together(run, audio, tmp_path, write_audio):
    other = write_audio(tmp_path / "other.ogg", 3000)
    # A file that is given twice is one file.
    status, out, err = run("encode", other, audio, audio / "a.wav", "-o", tmp_path / "codes")
    assert (status, err) == (0, [])
    assert out[0].startswith("encoded 4 of 4 clips")
    assert files_in(tmp_path / "codes") == [
        "a.safetensors",
        "b.safetensors",
        "other.safetensors",
        "sub/a.safetensors",
    ]


def test_encode_the_first_codebooks(run, audio, tmp_path):
    assert run("encode", audio / "a.wav", "-o", tmp_path / "all")[0] == 0
    assert run("encode", audio / "a.wav", "-o", tmp_path / "some", "--num-quantizers", 3)[0] == 0
    some, all_of_them = (AudioCodes.load(tmp_path / name / "a.safetensors") for name in ("some", "all"))
    assert torch.equal(some.codes, all_of_them.codes[:, :3])
    assert some.codebook_sizes == (1024, 1024, 128)


def test_encode_resamples_to_the_models_rate(run, tmp_path, write_audio):
    source = write_audio(tmp_path / "a.wav", 1001, sampling_rate=8000)
    assert run("encode", source, "-o", tmp_path / "a.safetensors")[0] == 0
    assert AudioCodes.load(tmp_path / "a.safetensors").num_samples == 3003


@pytest.mark.parametrize("content", [b"", b"RIFF: no audio at all"])
def test_a_bad_file_among_many_is_reported_and_left_out(run, audio, tmp_path, content):
    (audio / "aa.wav").write_bytes(content)
    status, out, err = run("encode", audio, "-o", tmp_path / "codes")
    assert status == 1
    assert out[0].startswith("encoded 3 of 4 clips")
    assert len(err) == 1
    assert err[0].startswith(f"mimo-audio: error: {audio / 'aa.wav'}: ")
    assert files_in(tmp_path / "codes") == ["a.safetensors", "b.safetensors", "sub/a.safetensors"]


def test_bad_files_only(run, tmp_path):
    (tmp_path / "a.wav").write_bytes(b"no audio")
    status, out, err = run("encode", tmp_path / "a.wav", "-o", tmp_path / "codes")
    assert (status, out, len(err)) == (1, [], 1)
    assert str(tmp_path / "a.wav") in err[0]
    assert files_in(tmp_path) == ["a.wav"]


def test_two_inputs_for_one_output_are_refused(run, audio, tmp_path, write_audio):
    write_audio(audio / "a.flac", 1000)
    status, out, err = run("encode", audio, "-o", tmp_path / "codes")
    assert (status, out, len(err)) == (1, [], 1)
    for name in (audio / "a.wav", audio / "a.flac", tmp_path / "codes" / "a.safetensors"):
        assert str(name) in err[0]
    assert not (tmp_path / "codes").exists()


def test_code_files_are_overwritten_and_other_files_are_not(run, audio, tmp_path):
    target = tmp_path / "codes.safetensors"
    assert run("encode", audio / "a.wav", "-o", target)[0] == 0
    assert run("encode", audio / "b.flac", "-o", target)[0] == 0
    assert AudioCodes.load(target).num_samples == 12345

    save_file({"weight": torch.ones(3)}, target)
    content = target.read_bytes()
    status, out, err = run("encode", audio / "a.wav", "-o", target)
    assert (status, out, len(err)) == (1, [], 1)
    assert f"{target} exists and is no code file" in err[0]
    assert target.read_bytes() == content


def test_one_file_that_is_in_the_way_stops_the_others_before_they_are_encoded(run, audio, tmp_path):
    (tmp_path / "codes" / "sub").mkdir(parents=True)
    (tmp_path / "codes" / "sub" / "a.safetensors").write_bytes(b"precious")
    status, out, err = run("encode", audio, "-o", tmp_path / "codes", "--batch-seconds", "0.01")
    assert (status, out, len(err)) == (1, [], 1)
    assert f"{tmp_path / 'codes' / 'sub' / 'a.safetensors'} exists and is no code file" in err[0]
    assert files_in(tmp_path / "codes") == ["sub/a.safetensors"]


@pytest.mark.parametrize(
    ("inputs", "output", "fault"),
    [
        (["nowhere.wav"], "codes", "nowhere.wav: no such file or folder"),
        (["audio", "nowhere"], "codes", "nowhere: no such file or folder"),
        (["empty"], "codes", "empty: no files to read; accepted in a folder: .wav, .flac"),
        (["audio"], "codes.safetensors", "codes.safetensors is one file for many inputs; accepted: a folder"),
        (["audio/a.wav", "audio/b.flac"], "codes.safetensors", "codes.safetensors is one file for many inputs"),
        (["audio"], "taken", "taken is one file for many inputs"),
        (["audio/a.wav"], "codes.npz", "codes.npz: accepted: a folder, or a name ending in .safetensors"),
        (["audio/a.wav"], "taken", "taken: accepted: a folder, or a name ending in .safetensors"),
    ],
)
def test_inputs_and_outputs_that_do_not_suit(run, audio, tmp_path, monkeypatch, inputs, output, fault):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").touch()
    before = files_in(tmp_path)
    status, out, err = run("encode", *inputs, "-o", output)
    assert (status, out, len(err)) == (1, [], 1)
    assert err[0].startswith("mimo-audio: error: ")
    assert fault in err[0]
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--num-quantizers", "21"], "num_quantizers=21; accepted: 1 to 20"),
        (["--attn-implementation", "torch_varlen"], "attn_implementation='torch_varlen'"),
    ],
)
def test_options_that_the_model_does_not_take(run, audio, tmp_path, options, fault):
    status, out, err = run("encode", audio, "-o", tmp_path / "codes", *options)
    assert (status, out, len(err)) == (1, [], 1)
    assert fault in err[0]
    assert not (tmp_path / "codes").exists()


def test_a_model_that_is_not_there(run, audio, tmp_path):
    status, out, err = run("encode", audio, "-o", tmp_path / "codes", model=tmp_path / "nowhere")
    assert (status, out, len(err)) == (1, [], 1)
    assert f"model='{tmp_path / 'nowhere'}': there is no such directory" in err[0]


def test_a_gpu_that_is_too_small(run, audio, tmp_path, monkeypatch):
    def run_out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mimo_audio_hf.commands.files.encode_waveforms", run_out_of_memory)
    status, out, err = run("encode", audio, "-o", tmp_path / "codes")
    assert (status, out, len(err)) == (1, [], 3)
    for line, name in zip(err, ("a.wav", "b.flac", "a.WAV"), strict=True):
        assert f"{name}: out of memory; accepted: a smaller --batch-seconds" in line


@pytest.mark.parametrize("error", [ValueError("too odd"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_file_that_cannot_be_converted_is_named_and_the_others_are(run, audio, tmp_path, monkeypatch, error):
    def encode(model, waveforms, *arguments, **options):
        if any(len(waveform) == 12345 for waveform in waveforms):
            raise error
        return encode_waveforms(model, waveforms, *arguments, **options)

    monkeypatch.setattr("mimo_audio_hf.commands.files.encode_waveforms", encode)
    status, out, err = run("encode", audio, "-o", tmp_path / "codes")
    assert (status, len(err)) == (1, 1)
    assert err[0].startswith(f"mimo-audio: error: {audio / 'b.flac'}: ")
    assert out[0].startswith(f"encoded 2 of 3 clips, {(5000 + 2400) / 24000:.2f} s of audio")
    assert files_in(tmp_path / "codes") == ["a.safetensors", "sub/a.safetensors"]


def test_a_file_that_cannot_be_saved_is_named_and_the_others_are(run, audio, tmp_path):
    assert run("encode", audio, "-o", tmp_path / "codes")[0] == 0
    (tmp_path / "decoded" / "a.wav").mkdir(parents=True)
    status, out, err = run("decode", tmp_path / "codes", "-o", tmp_path / "decoded")
    assert (status, len(err)) == (1, 1)
    assert err[0].startswith(f"mimo-audio: error: {tmp_path / 'decoded' / 'a.wav'}: ")
    assert out[0].startswith("decoded 2 of 3 clips")
    assert files_in(tmp_path / "decoded") == ["b.wav", "sub/a.wav"]


def test_a_model_without_decoder_is_said_once(run, audio, tmp_path):
    encoder = MiMoAudioTokenizerModel(MiMoAudioTokenizerConfig(**PRESETS["tiny"], has_decoder=False))
    encoder.save_pretrained(tmp_path / "encoder")
    assert run("encode", audio, "-o", tmp_path / "codes", model=tmp_path / "encoder")[0] == 0
    status, out, err = run("decode", tmp_path / "codes", "-o", tmp_path / "decoded", model=tmp_path / "encoder")
    assert (status, out, len(err)) == (1, [], 1)
    assert "encoder only" in err[0]


def test_folders_that_are_named_like_audio_are_no_files(run, audio, tmp_path):
    (audio / "folder.wav").mkdir()
    status, out, err = run("encode", audio, "-o", tmp_path / "codes")
    assert (status, err) == (0, [])
    assert out[0].startswith("encoded 3 of 3 clips")


def test_the_progress_bar_counts_all_files(run, audio, tmp_path, monkeypatch):
    bars = []

    class Bar(files.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(files, "tqdm", Bar)
    (audio / "aa.wav").write_bytes(b"no audio")
    assert run("encode", audio, "-o", tmp_path / "codes")[0] == 1
    assert [(bar.n, bar.total) for bar in bars] == [(4, 4)]


def test_files_are_loaded_a_few_batches_at_a_time(run, tmp_path, write_audio, monkeypatch):
    for number in range(12):
        write_audio(tmp_path / "audio" / f"{number}.wav", 2400)
    chunks: list[int] = []

    def encode(model, waveforms, *arguments, **options):
        chunks.append(len(waveforms))
        return encode_waveforms(model, waveforms, *arguments, **options)

    monkeypatch.setattr("mimo_audio_hf.commands.files.encode_waveforms", encode)
    assert run("encode", tmp_path / "audio", "-o", tmp_path / "codes", "--batch-seconds", "0.125")[0] == 0
    assert chunks == [5, 5, 2]  # four batches of 0.125 s hold five clips of 0.1 s


# --- decode ---


def test_decode_gives_as_many_samples_as_were_encoded(run, audio, tmp_path, tiny_model):
    assert run("encode", audio, "-o", tmp_path / "codes")[0] == 0
    status, out, err = run("decode", tmp_path / "codes", "-o", tmp_path / "decoded")
    assert (status, err) == (0, [])
    assert out[0].startswith("decoded 3 of 3 clips, 0.82 s of audio in ")
    assert files_in(tmp_path / "decoded") == ["a.wav", "b.wav", "sub/a.wav"]
    for name, samples in (("a", 5000), ("b", 12345), ("sub/a", 2400)):
        decoded, sampling_rate = soundfile.read(tmp_path / "decoded" / f"{name}.wav", dtype="float32")
        assert (len(decoded), sampling_rate) == (samples, 24000)
        codes = AudioCodes.load(tmp_path / "codes" / f"{name}.safetensors").codes
        expected = decode_codes(tiny_model, [codes])[0][:samples].clamp(-1, 1)
        torch.testing.assert_close(torch.from_numpy(decoded), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("format", ["wav", "flac", "ogg", "mp3"])
def test_decode_to_each_format(run, audio, tmp_path, format):
    assert run("encode", audio / "b.flac", "-o", tmp_path / "b.safetensors")[0] == 0
    assert run("decode", tmp_path / "b.safetensors", "-o", tmp_path / "folder", "--format", format)[0] == 0
    assert run("decode", tmp_path / "b.safetensors", "-o", tmp_path / f"named.{format}")[0] == 0
    for path in (tmp_path / "folder" / f"b.{format}", tmp_path / f"named.{format}"):
        assert soundfile.info(path).format == ("MP3" if format == "mp3" else format.upper())
        assert len(load_audio(path)) == 12345


def test_a_file_name_of_another_format_than_asked_for(run, audio, tmp_path):
    assert run("encode", audio / "a.wav", "-o", tmp_path / "a.safetensors")[0] == 0
    status, out, err = run("decode", tmp_path / "a.safetensors", "-o", tmp_path / "a.wav", "--format", "flac")
    assert (status, out, len(err)) == (1, [], 1)
    assert "a.wav: accepted: a folder, or a name ending in .flac" in err[0]
    assert not (tmp_path / "a.wav").exists()


def test_decode_leaves_out_what_are_no_codes(run, audio, tmp_path):
    codes = tmp_path / "codes"
    assert run("encode", audio, "-o", codes)[0] == 0
    save_file({"weight": torch.ones(3)}, codes / "model.safetensors")
    AudioCodes(torch.zeros(2, 1, dtype=torch.long), (64,), 24000, 960, 1000, "other").save(codes / "other.safetensors")
    status, out, err = run("decode", codes, "-o", tmp_path / "decoded")
    assert status == 1
    assert out[0].startswith("decoded 3 of 5 clips")
    assert len(err) == 2
    assert err[0].startswith(f"mimo-audio: error: {codes / 'model.safetensors'}: ")
    assert err[1].startswith(f"mimo-audio: error: {codes / 'other.safetensors'}: codebook_sizes=[64]")
    assert files_in(tmp_path / "decoded") == ["a.wav", "b.wav", "sub/a.wav"]


def test_decoding_the_codes_of_another_model_is_said_once(run, audio, tmp_path, caplog):
    init_checkpoint(tmp_path / "other", "tiny", seed=1)
    assert run("encode", audio, "-o", tmp_path / "codes")[0] == 0
    assert caplog.messages == []
    assert run("decode", tmp_path / "codes", "-o", tmp_path / "decoded", model=tmp_path / "other")[0] == 0
    assert len(caplog.messages) == 1
    assert str(tmp_path / "other") in caplog.messages[0]


# --- roundtrip ---


def test_roundtrip_of_speech(run, tmp_path, tiny_model):
    status, out, err = run("roundtrip", SPEECH, tmp_path / "out.wav")
    assert (status, err) == (0, [])
    assert out[0].startswith("encoded and decoded 1 of 1 clip, ")
    assert out[0].endswith(f"-> {tmp_path / 'out.wav'}")
    waveform = load_audio(SPEECH)
    expected = decode_codes(tiny_model, encode_waveforms(tiny_model, [waveform]))[0][: len(waveform)].clamp(-1, 1)
    torch.testing.assert_close(load_audio(tmp_path / "out.wav"), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("samples", "sampling_rate", "expected"),
    [(1, 24000, 1), (959, 24000, 959), (960, 24000, 960), (4411, 44100, 2401)],
)
def test_roundtrip_has_as_many_samples_as_the_input(run, tmp_path, write_audio, samples, sampling_rate, expected):
    source = write_audio(tmp_path / "in.wav", samples, sampling_rate=sampling_rate)
    assert run("roundtrip", source, tmp_path / "out.flac", "--num-quantizers", 2)[0] == 0
    info = soundfile.info(tmp_path / "out.flac")
    assert (info.frames, info.samplerate) == (expected, 24000)


def test_roundtrip_onto_its_own_input_is_refused(run, audio, monkeypatch):
    content = (audio / "a.wav").read_bytes()
    monkeypatch.chdir(audio)
    status, out, err = run("roundtrip", audio / "a.wav", "a.wav")
    assert (status, out, len(err)) == (1, [], 1)
    assert "a.wav is the input itself" in err[0]
    assert (audio / "a.wav").read_bytes() == content


@pytest.mark.parametrize(
    ("source", "target", "fault"),
    [
        ("audio/a.wav", "out.xyz", "out.xyz: accepted: a file name ending in .wav, .flac, .ogg, .mp3"),
        ("nowhere.wav", "out.wav", "nowhere.wav: No such file"),
        ("audio", "out.wav", "audio: a directory"),
    ],
)
def test_roundtrip_of_what_is_no_audio(run, audio, tmp_path, monkeypatch, source, target, fault):
    monkeypatch.chdir(tmp_path)
    status, out, err = run("roundtrip", source, target)
    assert (status, out, len(err)) == (1, [], 1)
    assert fault in err[0]
    assert not (tmp_path / target).exists()


# --- info and init ---


def fields(lines: list[str]) -> list[tuple[str, str]]:
    return [(name, value) for name, _, value in (line.partition(" ") for line in lines) for value in [value.strip()]]


def test_info_on_a_model(run, tiny_checkpoint):
    status, out, err = run("info", tiny_checkpoint, "--dtype", "bfloat16", "--device", "cpu")
    assert (status, err) == (0, [])
    assert fields(out) == [
        ("model", str(tiny_checkpoint)),
        ("size", "4.7 M parameters, 11.6 MB with the codebooks"),
        ("encoder", "4 layers, 4 heads of 32"),
        ("decoder", "4 layers, 4 heads of 32; vocoder of 6 layers of width 192"),
        ("audio", "24000 Hz, mono"),
        ("codes", "25 frames/s, 960 samples each"),
        ("codebooks", "20: 2 x 1024, 18 x 128 entries"),
        ("bitrate", "250 bit/s with 1 codebook"),
        ("bitrate", "1550 bit/s with 8 codebooks"),
        ("bitrate", "3650 bit/s with 20 codebooks"),
        ("dtype", "bfloat16"),
        ("device", "cpu"),
        ("attention", "sdpa"),
    ]


def test_info_on_codes(run, tmp_path):
    path = tmp_path / "clip.safetensors"
    codes = torch.tensor([[7, 0], [7, 1], [7, 2], [7, 2]])
    AudioCodes(codes, (1024, 128), 24000, 960, 3600, "owner/name").save(path)
    status, out, err = run("info", path)
    assert (status, err) == (0, [])
    assert fields(out[:6]) == [
        ("codes", str(path)),
        ("model", "owner/name"),
        ("audio", "0.150 s (3600 samples at 24000 Hz)"),
        ("frames", "4 at 25 frames/s"),
        ("codebooks", "2"),
        ("bitrate", "425 bit/s"),
    ]
    # One entry all the time; and two once, one twice: exp(log(4) / 2 + log(2) / 2) = sqrt(8).
    assert [line.split() for line in out[7:]] == [
        ["codebook", "entries", "used", "perplexity"],
        ["0", "1024", "1", "1.0"],
        ["1", "128", "3", "2.8"],
    ]


def test_info_on_weights_says_that_they_are_no_codes(run, tiny_checkpoint):
    status, out, err = run("info", tiny_checkpoint / "model.safetensors")
    assert (status, out, len(err)) == (1, [], 1)
    assert f"{tiny_checkpoint / 'model.safetensors'}: a safetensors file, but not of codes" in err[0]


def test_init_writes_a_checkpoint_once(run, tmp_path):
    directory = tmp_path / "new" / "checkpoint"
    status, out, err = run("init", directory, "--preset", "tiny", "--seed", 3)
    assert (status, err) == (0, [])
    assert out[0].startswith("initialized 4.7 M parameters, 23.2 MB with the codebooks (tiny, seed 3) in ")
    assert out[0].endswith(f"-> {directory}")
    assert run("info", directory)[0] == 0

    content = (directory / "model.safetensors").read_bytes()
    status, out, err = run("init", directory, "--preset", "tiny")
    assert (status, out, len(err)) == (1, [], 1)
    assert f"{directory} already holds a checkpoint" in err[0]
    assert (directory / "model.safetensors").read_bytes() == content


# --- usage ---


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["bake"], "bake"),
        (["encode", "a.wav"], "-o/--output"),
        (["encode", "-o", "codes"], "IN"),
        (["encode", "a.wav", "-o", "codes", "--dtype", "int4"], "int4"),
        (["decode", "a.safetensors", "-o", "out", "--format", "aac"], "aac"),
        (["encode", "a.wav", "-o", "-"], "'-', standard input or output"),
        (["encode", "-", "-o", "codes"], "'-', standard input or output"),
        (["roundtrip", "-", "out.wav"], "'-', standard input or output"),
        (["encode", "a.wav", "-o", "codes", "--batch-seconds", "0"], "'0'; accepted: a positive number"),
        (["encode", "a.wav", "-o", "codes", "--batch-seconds", "nan"], "'nan'; accepted: a positive number"),
        (["encode", "a.wav", "-o", "codes", "--batch-seconds", "x"], "'x'; accepted: a positive number"),
        (["encode", "a.wav", "-o", "codes", "--num-quantizers", "0"], "'0'; accepted: 1 or more"),
        (["init", "folder"], "--preset"),
        (["init", "folder", "--preset", "huge"], "huge"),
    ],
)
def test_bad_usage_is_one_line(capsys, arguments, culprit):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert culprit in lines[0]


def test_the_module_runs_and_lists_its_commands():
    done = subprocess.run([sys.executable, "-m", "mimo_audio_hf.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    for command in ("encode", "decode", "roundtrip", "info", "init", "evaluate"):
        assert command in done.stdout


def test_an_interrupted_command_says_so_in_one_line(run, audio, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mimo_audio_hf.commands.files.load_converter", interrupt)
    assert main(["encode", str(audio / "a.wav"), "-o", str(tmp_path / "codes"), "--model", "tiny"]) == 130
    assert capsys.readouterr().err == "mimo-audio: error: interrupted\n"
