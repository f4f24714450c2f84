"""`tokenize_audio` and `detokenize_audio` under `datasets`."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset, Features, IterableDataset, Value

from mimo_audio_hf import decode_codes, detokenize_audio, encode_waveforms, load_audio, tokenize_audio
from mimo_audio_hf.dataset import tokenized_features


RATES = [24000, 16000, 44100]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """200 clips of 1 sample to 2 seconds, of several rates, formats and channel counts."""
    folder = tmp_path_factory.mktemp("clips")
    generator = np.random.default_rng(0)
    paths = []
    for index in range(200):
        samples = 1 if index == 0 else int(generator.integers(50, 48000 if index % 20 == 0 else 6000))
        channels = 2 if index % 7 == 0 else 1
        noise = generator.uniform(-0.5, 0.5, (samples, channels)).astype(np.float32)
        path = folder / f"{index:03}.{'flac' if index % 3 == 0 else 'wav'}"
        soundfile.write(path, noise, RATES[index % len(RATES)])
        paths.append(str(path))
    return paths


@pytest.fixture(scope="module")
def expected(files, tiny_model) -> list[np.ndarray]:
    return [encode_waveforms(tiny_model, [load_audio(path)])[0].numpy() for path in files]


class Decoder:
    """What torchcodec's AudioDecoder has of interest."""

    def __init__(self, path: str) -> None:
        self.path = path

    def get_all_samples(self):
        samples, self.sample_rate = soundfile.read(self.path, dtype="float32", always_2d=True)
        self.data = torch.from_numpy(samples.T)
        return self


def decoded(path: str) -> dict:
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return {"array": samples.T.squeeze(0) if samples.shape[1] == 1 else samples.T, "sampling_rate": rate}


COLUMNS = {
    "paths": lambda path: path,
    "bytes": lambda path: Path(path).read_bytes(),
    "files": lambda path: {"bytes": Path(path).read_bytes(), "path": None},
    "file paths": lambda path: {"bytes": None, "path": path},
    "arrays": decoded,
    "decoders": Decoder,
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_every_kind_of_column(files, expected, tiny_model, kind):
    if kind in ("arrays", "decoders"):  # multi-channel arrays of mixed shapes and objects do not fit into Arrow
        batch = tokenize_audio({"audio": [COLUMNS[kind](path) for path in files]}, model=tiny_model)
        codes = batch["audio_codes"]
    else:
        dataset = Dataset.from_dict({"audio": [COLUMNS[kind](path) for path in files]})
        mapped = dataset.map(
            tokenize_audio, batched=True, batch_size=64, fn_kwargs={"model": tiny_model}, load_from_cache_file=False
        )
        assert str(mapped.features["audio_codes"]) == "List(List(Value('int16')))"
        codes = mapped.with_format("numpy")["audio_codes"]
    for mine, reference in zip(codes, expected, strict=True):
        assert np.array_equal(np.asarray(mine), reference)


def test_undecoded_audio_feature_two_processes_and_streaming(files, expected, tiny_checkpoint):
    dataset = Dataset.from_dict({"audio": files}).cast_column("audio", Audio(decode=False))
    arguments = {"model": str(tiny_checkpoint), "device": "cpu"}
    mapped = dataset.map(
        tokenize_audio, batched=True, batch_size=50, with_rank=True, num_proc=2, fn_kwargs=arguments
    ).with_format("numpy")
    streamed = dataset.to_iterable_dataset().map(tokenize_audio, batched=True, batch_size=32, fn_kwargs=arguments)
    assert isinstance(streamed, IterableDataset)
    assert str(mapped.features["audio_codes"]) == "List(List(Value('int16')))"
    for row, stream, reference in zip(mapped, streamed, expected, strict=True):
        assert np.array_equal(row["audio_codes"], reference)
        assert np.array_equal(np.asarray(stream["audio_codes"]), reference)


def test_detokenize_gives_the_original_lengths(files, tiny_model):
    dataset = Dataset.from_dict({"path": [*files[:30], None]})
    tokenized = dataset.map(tokenize_audio, batched=True, fn_kwargs={"model": tiny_model, "audio_column": "path"})
    back = tokenized.map(detokenize_audio, batched=True, fn_kwargs={"model": tiny_model})
    for row, path in zip(back, files[:30], strict=False):
        assert len(row["audio"]["array"]) == len(load_audio(path)) == row["num_samples"]
        assert row["audio"]["sampling_rate"] == 24000
        alone = decode_codes(tiny_model, [torch.tensor(row["audio_codes"])])[0][: row["num_samples"]]
        torch.testing.assert_close(
            torch.tensor(row["audio"]["array"]), alone, rtol=0, atol=1e-5 * alone.abs().max().item()
        )
    assert back[30]["audio"] is None
    whole = detokenize_audio({"audio_codes": [tokenized[5]["audio_codes"]]}, model=tiny_model)["audio"][0]
    assert len(whole["array"]) == 960 * len(tokenized[5]["audio_codes"])


def test_null_rows_stay_null_and_features_are_declared(files, tiny_model):
    dataset = Dataset.from_dict({"audio": [None, None, files[3]]}, features=Features({"audio": Value("string")}))
    features = tokenized_features(dataset.features, tiny_model.config)
    mapped = dataset.map(
        tokenize_audio,
        batched=True,
        batch_size=1,
        writer_batch_size=1,
        features=features,
        fn_kwargs={"model": tiny_model},
    )
    assert mapped.features == features
    assert mapped["audio_codes"][:2] == [None, None]
    assert mapped["num_samples"][2] == len(load_audio(files[3]))


def test_num_quantizers_and_small_codebooks(files, tiny_model):
    batch = tokenize_audio({"audio": files[:2]}, model=tiny_model, num_quantizers=3, codes_column="tokens")
    assert [codes.shape[1] for codes in batch["tokens"]] == [3, 3]
    assert batch["tokens"][0].dtype == np.int16


BAD = {
    "missing": "/nowhere/x.wav",
    "text": b"this is no audio",
    "empty": b"",
    "silent failure": {"array": None, "sampling_rate": None},
    "no rate": [0.1, 0.2],
    "a path that is a number": {"bytes": None, "path": 5},
    "text in an array": {"array": ["a"], "sampling_rate": 24000},
    "integers": {"array": [1, 2, 3], "sampling_rate": 24000},
    "nan": {"array": [0.1, float("nan")], "sampling_rate": 24000},
    "samples first": {"array": np.zeros((100, 2), np.float32), "sampling_rate": 24000},
    "no samples": {"array": [], "sampling_rate": 24000},
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows(files, tiny_model, kind):
    batch = {"audio": [files[1], BAD[kind], files[2]]}
    with pytest.raises(ValueError, match=r"audio\[1\]: "):
        tokenize_audio(batch, model=tiny_model)
    recorded = tokenize_audio(batch, model=tiny_model, on_error="record")
    assert [codes is None for codes in recorded["audio_codes"]] == [False, True, False]
    assert [error is None for error in recorded["audio_error"]] == [True, False, True]
    good = tokenize_audio({"audio": [files[1], files[2]]}, model=tiny_model)
    assert np.array_equal(recorded["audio_codes"][2], good["audio_codes"][1])


def test_bad_options(files, tiny_model):
    with pytest.raises(ValueError, match="there is no column 'sound'; accepted: 'audio'"):
        tokenize_audio({"audio": files[:1]}, model=tiny_model, audio_column="sound")
    with pytest.raises(ValueError, match="on_error='ignore'"):
        tokenize_audio({"audio": files[:1]}, model=tiny_model, on_error="ignore")
    with pytest.raises(ValueError, match="num_quantizers=21"):
        tokenize_audio({"audio": files[:1]}, model=tiny_model, num_quantizers=21)
    with pytest.raises(ValueError, match="audio_codes\\[1\\]"):
        detokenize_audio({"audio_codes": [None, [[5000]]]}, model=tiny_model)


CACHED_RUN = """
import sys
from datasets import load_dataset
import mimo_audio_hf.dataset as module
from mimo_audio_hf import MiMoAudioTokenizerModel, tokenize_audio

calls = 0
original = MiMoAudioTokenizerModel.encode
def counted(*args, **kwargs):
    global calls
    calls += 1
    return original(*args, **kwargs)
MiMoAudioTokenizerModel.encode = counted
dataset = load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
dataset = dataset.map(tokenize_audio, batched=True, fn_kwargs={"model": sys.argv[3], "device": "cpu"})
print(calls, sum(len(codes) for codes in dataset["audio_codes"]))
"""


def test_a_second_run_in_a_new_process_calls_no_model(files, tiny_checkpoint, tmp_path):
    (tmp_path / "list.jsonl").write_text("".join(f'{{"audio": "{path}"}}\n' for path in files[:10]))
    outputs = []
    for _ in range(2):
        arguments = [str(tmp_path / "list.jsonl"), str(tmp_path / "cache"), str(tiny_checkpoint)]
        run = subprocess.run([sys.executable, "-c", CACHED_RUN, *arguments], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout.split())
    (first_calls, first_codes), (second_calls, second_codes) = outputs
    assert int(first_calls) > 0
    assert int(second_calls) == 0
    assert first_codes == second_codes


def test_file_objects_are_read(files, tiny_model):
    batch = tokenize_audio({"audio": [io.BytesIO(Path(files[4]).read_bytes())]}, model=tiny_model)
    assert np.array_equal(
        batch["audio_codes"][0], tokenize_audio({"audio": [files[4]]}, model=tiny_model)["audio_codes"][0]
    )


def test_reversed_arrays_and_failing_decoders(files, tiny_model):
    samples, rate = soundfile.read(files[1], dtype="float32")
    forward = tokenize_audio({"audio": [{"array": samples[::-1].copy(), "sampling_rate": rate}]}, model=tiny_model)
    reverse = tokenize_audio({"audio": [{"array": samples[::-1], "sampling_rate": rate}]}, model=tiny_model)
    assert np.array_equal(forward["audio_codes"][0], reverse["audio_codes"][0])

    class Broken:
        def get_all_samples(self):
            raise RuntimeError("damaged")

    recorded = tokenize_audio({"audio": [Broken(), files[1]]}, model=tiny_model, on_error="record")
    assert "damaged" in recorded["audio_error"][0]
    assert recorded["audio_codes"][1] is not None


@pytest.mark.parametrize("codes", [[[1, 2], [1]], [["a"]], [1, 2]])
def test_bad_codes_are_named(tiny_model, codes):
    with pytest.raises(ValueError, match=r"audio_codes\[1\]"):
        detokenize_audio({"audio_codes": [None, codes]}, model=tiny_model)


def test_lengths_are_positive(tiny_model):
    with pytest.raises(ValueError, match=r"num_samples\[0\]=-5"):
        detokenize_audio({"audio_codes": [[[0] * 20] * 4], "num_samples": [-5]}, model=tiny_model)
