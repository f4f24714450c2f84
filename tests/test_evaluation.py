"""Metrics against independent computations, and evaluations of folders, datasets and lists."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pystoi
import pytest
import soundfile
import torch
from datasets import Audio, Dataset, DatasetDict
from matplotlib.image import imread
from scipy.signal import resample_poly
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

from mimo_audio_hf import decode_codes, encode_waveforms, load_audio, load_model
from mimo_audio_hf import evaluation as evaluation_module
from mimo_audio_hf.cli import main
from mimo_audio_hf.evaluation import Clip, ClipScores, Evaluation, _PendingScores, evaluate, read_sources
from mimo_audio_hf.metrics import (
    CodebookUse,
    SpeakerVerifier,
    codebook_use,
    mel_distance,
    pesq,
    require_package,
    stoi,
)
from mimo_audio_hf.workers import worker_pool


SPEECH = Path(__file__).parent / "fixtures" / "audio" / "prompt_speech_en_m.wav"
RATE = 24000
# PESQ comes as C sources: `pip install -e ".[test]"` is not to need a compiler.
WITHOUT_PESQ = ["stoi", "mel_distance"]


@pytest.fixture(scope="module")
def speech() -> torch.Tensor:
    return load_audio(SPEECH)


@pytest.fixture(scope="module")
def noisy(speech) -> torch.Tensor:
    return speech + 0.02 * torch.randn(len(speech), generator=torch.Generator().manual_seed(0))


# --- metrics ---


@pytest.mark.parametrize("mode", ["nb", "wb"])
def test_pesq(speech, noisy, mode):
    package = pytest.importorskip("pesq", reason="pesq is not installed: PESQ was not tested")
    expected = package.pesq(16000, *(resample_poly(signal.double().numpy(), 2, 3) for signal in (speech, noisy)), mode)
    score = pesq(speech, noisy, RATE, mode)
    assert 1.1 < score < 4
    assert score == pytest.approx(expected, abs=0.05)  # of another resampling filter
    assert pesq(speech, speech, RATE, mode) > 4.5
    with pytest.raises(ValueError, match="PESQ: the reference is silent"):
        pesq(torch.zeros(RATE), noisy[:RATE], RATE, mode)
    with pytest.raises(ValueError, match="PESQ: the degraded signal is silent"):
        pesq(noisy, torch.zeros(len(noisy)), RATE, mode)
    with pytest.raises(ValueError, match="PESQ: .*1/4 of a second"):
        pesq(speech[:2000], speech[:2000], RATE, mode)


def test_pesq_of_many_utterances():
    """The package has room for 50; of more the scores are wrong, and of many more it crashes."""
    pytest.importorskip("pesq", reason="pesq is not installed: PESQ was not tested")
    noise = torch.randn(6000, generator=torch.Generator().manual_seed(0)) * 0.1
    most = torch.cat([noise, torch.zeros(6000)]).repeat(40)
    assert pesq(most, most, RATE, "nb") > 4.5  # of 20 s
    with pytest.raises(ValueError, match="PESQ: longer than 20 s"):
        pesq(torch.cat([most, noise]), torch.cat([most, noise]), RATE, "nb")


def test_pesq_has_two_modes(speech):
    with pytest.raises(ValueError, match="mode='swb'; accepted: 'nb' or 'wb'"):
        pesq(speech, speech, RATE, "swb")


def test_stoi(speech, noisy):
    score = stoi(speech, noisy, RATE)
    assert 0.3 < score < 0.99
    assert score == pystoi.stoi(speech.double().numpy(), noisy.double().numpy(), RATE)
    assert stoi(noisy, speech, RATE) != pytest.approx(score, abs=1e-3)
    assert stoi(speech, speech, RATE) == pytest.approx(1)
    for nothing in (torch.zeros(RATE), speech[:2000]):
        with pytest.raises(ValueError, match="STOI: "):
            stoi(nothing, nothing, RATE)


def log_mel_float64(samples: np.ndarray, rate: int, floor: float) -> np.ndarray:
    """128 HTK triangles over windows of 40 ms every 10 ms, from its definition."""
    hop, size = rate // 100, rate // 25
    padded = np.pad(samples, size // 2, mode="reflect")
    window = np.sin(np.pi * np.arange(size) / size) ** 2
    frames = np.stack([padded[start : start + size] * window for start in range(0, len(padded) - size + 1, hop)])
    magnitudes = np.abs(np.fft.rfft(frames))
    edges = 700 * (10 ** (np.linspace(0, 2595 * math.log10(1 + rate / 2 / 700), 130) / 2595) - 1)
    bins = np.fft.rfftfreq(size, 1 / rate)
    filters = [np.interp(bins, edges[i : i + 3], [0, 1, 0], left=0, right=0) for i in range(128)]
    return np.log(np.maximum(magnitudes @ np.array(filters).T, floor))


@pytest.mark.parametrize("rate", [24000, 16000])
def test_mel_distance(speech, noisy, rate):
    mels = [log_mel_float64(signal.double().numpy(), rate, 1e-3) for signal in (speech, noisy)]
    expected = np.abs(mels[0] - mels[1]).mean()
    assert expected > 0.5
    assert mel_distance(speech, noisy, rate) == pytest.approx(expected, rel=1e-4)  # float32
    assert mel_distance(speech, speech, rate) == 0
    # Noise of an eighth of a 16-bit step in silence is no distance: it is under the floor.
    assert mel_distance(torch.zeros(RATE), torch.rand(RATE) * 2**-18, rate) == 0


def test_codebook_use_counts_all_clips():
    clips = [torch.tensor([[7, 0], [7, 1]], dtype=torch.uint8), torch.tensor([[7, 2], [7, 2]]), torch.tensor([[6]])]
    first, second, third = codebook_use(clips, [1024, 128, 4])
    # Four times one entry and once another; twice once and once twice; never.
    assert first == CodebookUse(1024, 2, pytest.approx(math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))))
    assert second == CodebookUse(128, 3, pytest.approx(math.sqrt(8)))
    assert third == CodebookUse(4, 0, 1.0)
    uniform = torch.arange(128).repeat(3)[:, None]
    assert codebook_use([uniform], [128]) == [CodebookUse(128, 128, pytest.approx(128))]
    for code in (4, -1, 2**60):
        with pytest.raises(ValueError, match=f"hold {code} for codebook 1.*accepted: 0 to 3"):
            codebook_use([torch.tensor([[0, code]])], [4, 4])
    with pytest.raises(ValueError, match=r"shape \(1, 2\); accepted: \(frames, 1 to 1 codebooks\)"):
        codebook_use([torch.tensor([[1, 1]])], [4])


@pytest.mark.parametrize("metric", [stoi, mel_distance, lambda *signals: pesq(*signals, "nb")])
def test_metrics_compare_equally_long_signals(speech, metric):
    if metric not in (stoi, mel_distance):
        pytest.importorskip("pesq", reason="pesq is not installed: PESQ was not tested")
    for other in (speech[1:], speech[None]):
        with pytest.raises(ValueError, match=r"accepted: \(samples,\), equally long"):
            metric(speech, other, RATE)
    for value in (math.nan, math.inf):  # of which STOI would make a score
        damaged = torch.where(torch.arange(len(speech)) == 1000, value, speech)
        with pytest.raises(ValueError, match="a signal has NaN or infinite samples"):
            metric(speech, damaged, RATE)


@pytest.fixture(scope="module")
def speaker_model(tmp_path_factory) -> Path:
    """A small model for speaker verification, randomly initialized."""
    directory = tmp_path_factory.mktemp("speaker")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = WavLMConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            conv_dim=(16,) * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            tdnn_dim=(16, 16, 16, 16, 32),
            xvector_output_dim=24,
        )
        WavLMForXVector(config).save_pretrained(directory)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(directory)
    return directory


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_speaker_similarity(speech, speaker_model):
    verifier = SpeakerVerifier(speaker_model)
    one, other = speech[:48000], speech[48000:96000].flip(0)
    model = WavLMForXVector.from_pretrained(speaker_model).eval()
    embeddings = []
    for clip in (one, other):
        normalized = (clip - clip.mean()) / (clip.var(unbiased=False) + 1e-7).sqrt()
        with torch.inference_mode():
            embeddings.append(model(normalized[None]).embeddings[0].double().numpy())
    expected = np.dot(*embeddings) / np.linalg.norm(embeddings[0]) / np.linalg.norm(embeddings[1])
    assert verifier.similarity(one, other, 16000) == pytest.approx(expected, abs=1e-5)
    assert verifier.similarity(one, one, RATE) == pytest.approx(1, abs=1e-5)
    assert verifier.similarity(one, other, RATE) != pytest.approx(expected, abs=1e-5)  # resampled
    with pytest.raises(ValueError, match="speaker similarity: the clip is too short"):
        verifier.similarity(one[:400], one[:400], RATE)
    # Enough for a frame after the convolutions and the TDNN's contexts, but not for its standard deviation.
    with pytest.raises(ValueError, match="the clip is too short for"):
        verifier.embedding(one[: 400 + 14 * 320], 16000)
    assert verifier.embedding(one[: 400 + 15 * 320], 16000).isfinite().all()


def test_speaker_model_runs_in_float32(speech, speaker_model, tmp_path):
    WavLMForXVector.from_pretrained(speaker_model).half().save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path)
    similarity = SpeakerVerifier(tmp_path).similarity(speech, speech.flip(0), RATE)
    expected = SpeakerVerifier(speaker_model).similarity(speech, speech.flip(0), RATE)
    assert similarity == pytest.approx(expected, abs=1e-2)  # of rounded weights


def test_speaker_model_has_to_be_one(tmp_path, tiny_checkpoint):
    for directory in (tmp_path, tiny_checkpoint):
        with pytest.raises(ValueError, match=f"speaker model '{directory}'.*accepted: a Hub id or a directory"):
            SpeakerVerifier(directory)


def test_an_encoder_without_its_head_is_no_speaker_model(tmp_path, speaker_model):
    model = WavLMForXVector.from_pretrained(speaker_model)
    model.wavlm.save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no weights classifier.*accepted: a model that was trained for speaker"):
        SpeakerVerifier(tmp_path)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pystoi", None)
    with pytest.raises(ModuleNotFoundError, match=r"pystoi is not installed; .*'mimo-audio-hf\[eval\]'"):
        require_package("pystoi")


# --- sources ---


@pytest.fixture(scope="module")
def clips_by_language(tmp_path_factory, speech) -> Path:
    """Folders zh and en with clips of speech."""
    folder = tmp_path_factory.mktemp("recordings")
    for place, first, last in (("zh/a.wav", 0, 30001), ("zh/more/b.flac", 20000, 50000), ("en/c.wav", 40000, 75000)):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / place, speech[first:last].numpy(), RATE)
    (folder / "notes.txt").write_text("no audio")
    return folder


def test_folder(clips_by_language, tmp_path):
    clips = read_sources([clips_by_language])
    found = [(Path(clip.key).relative_to(clips_by_language).as_posix(), clip.subset, clip.audio) for clip in clips]
    assert found == [
        (name, name.split("/")[0], str(clips_by_language / name))
        for name in ("en/c.wav", "zh/a.wav", "zh/more/b.flac")
    ]
    assert len(clips) == 3
    assert {clip.subset for clip in read_sources([clips_by_language / "en"])} == {"en"}
    # What is hidden is not somebody's recording: macOS leaves such files beside them.
    shutil.copytree(clips_by_language, tmp_path / "copy")
    (tmp_path / "copy" / "zh" / "._a.wav").write_bytes(b"")
    assert len(read_sources([tmp_path / "copy"])) == 3


@pytest.mark.parametrize("form", ["dataset", "splits", "parquet", "parquet file"])
def test_dataset(tmp_path, clips_by_language, form):
    paths = sorted(map(str, (clips_by_language / "zh").rglob("*.*")))
    rows = {"key": ["one", "two"], "speech": [{"bytes": Path(path).read_bytes(), "path": None} for path in paths]}
    dataset = Dataset.from_dict(rows).cast_column("speech", Audio(sampling_rate=16000))
    directory = tmp_path / "data"
    if form == "dataset":
        dataset.save_to_disk(directory)
        expected = [("data/one", "data"), ("data/two", "data")]
    elif form == "splits":
        DatasetDict(test=dataset, dev=dataset.add_column("language", ["de", "nl"])).save_to_disk(directory)
        expected = [("data/test/one", "test"), ("data/test/two", "test"), ("data/dev/one", "de")]
        expected += [("data/dev/two", "nl")]
    else:
        (directory / "zh").mkdir(parents=True)
        dataset.to_parquet(directory / "validation-00000-of-00001.parquet")
        expected = [("data/one", "validation"), ("data/two", "validation")]
        if form == "parquet":
            other = Dataset.from_dict(rows | {"key": ["three", "four"]}).cast(dataset.features)
            other.to_parquet(directory / "zh" / "test.parquet")
            expected += [("data/three", "zh"), ("data/four", "zh")]
        else:
            directory /= "validation-00000-of-00001.parquet"
            expected = [(f"data/{directory.name}/{key.split('/')[1]}", subset) for key, subset in expected]
    clips = read_sources([directory])
    found = list(clips)
    assert [(Path(clip.key).relative_to(tmp_path).as_posix(), clip.subset) for clip in found] == expected
    assert [clip.audio["bytes"] for clip in found[:2]] == [Path(path).read_bytes() for path in paths]
    with pytest.raises(ValueError, match="no column 'voice'; accepted as --column: 'key', 'speech'"):
        read_sources([directory], column="voice")


def test_a_parquet_file_is_read_a_unit_at_a_time(tmp_path, monkeypatch):
    table = pa.table({"key": [f"{row}" for row in range(600)], "audio": [b"x"] * 600, "other": ["long"] * 600})
    pq.write_table(table, tmp_path / "all.parquet", row_group_size=300)
    clips = read_sources([tmp_path / "all.parquet"])
    reads: list[list[str]] = []
    read = pq.ParquetFile.read_row_group

    def count(self, *args, **options):
        reads.append(options["columns"])
        return read(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", count)
    assert [clip.key for clip in clips] == [f"{tmp_path}/all.parquet/{row}" for row in range(600)]
    assert reads == [["audio"]] * 4  # units of 256 and 44 rows in each group


def test_a_source_that_fails_while_it_is_read(tmp_path):
    table = pa.table({"key": ["a", "b"], "audio": [b"x", b"y"]})
    pq.write_table(table, tmp_path / "all.parquet")
    clips = read_sources([tmp_path / "all.parquet"])
    (tmp_path / "all.parquet").unlink()
    assert [type(clip.audio) for clip in clips] == [FileNotFoundError] * 2


def test_list(tmp_path):
    folder = tmp_path / "zh"
    folder.mkdir()
    lines = [
        "1-2|prompt\u2028one|prompt-wavs/1.wav|text",  # a line separator for some, but not for lists
        "1-3|prompt one| prompt-wavs/1.wav |text|other/3.wav",
        "",
        "bad|line",
        "2-3.wav|提示|/elsewhere/二.wav|text\r",
    ]
    (folder / "meta.lst").write_text("\n".join(lines), encoding="utf-8-sig")
    problem, *_ = [clip for clip in read_sources([folder / "meta.lst"]) if isinstance(clip.audio, Exception)]
    assert (problem.key, problem.subset) == (f"{folder / 'meta.lst'}/line 4", "zh")
    assert str(problem.audio) == "2 fields; accepted: name|prompt text|prompt audio|text, or with |audio at the end"

    def paths(**options: str) -> list[str]:
        clips = [clip for clip in read_sources([folder / "meta.lst"], **options) if clip.key != problem.key]
        assert {clip.subset for clip in clips} == {"zh"}
        assert [clip.audio for clip in clips] == [clip.key for clip in clips]
        return [clip.key for clip in clips]

    assert paths() == [str(folder / "prompt-wavs/1.wav"), "/elsewhere/二.wav"]
    assert paths(list_audio="target") == [
        str(folder / name) for name in ("wavs/1-2.wav", "other/3.wav", "wavs/2-3.wav")
    ]


def test_bad_sources(tmp_path, clips_by_language):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.lst").write_text("\n")
    (tmp_path / "latin.lst").write_bytes(b"\xff\xfe\xfa")
    for source, message in (
        ("missing", "missing: there is no such file or folder; accepted: a folder"),
        ("empty", "empty: no files to read"),
        ("empty.lst", "empty.lst: no clips"),
        ("latin.lst", "latin.lst: not a text file in UTF-8"),
    ):
        with pytest.raises(ValueError, match=message):
            read_sources([tmp_path / source])
    (tmp_path / "saved").mkdir()
    for content, message in (
        ("[]", "holds a list; accepted: a JSON object"),
        ("{}", ": splits is missing; accepted: list"),
        ('{"splits": "train"}', ": splits is of type str"),
        ('{"splits": []}', r": splits are \[\]; accepted: one or more names"),
        ('{"splits": [1]}', r": splits are \[1\]"),
    ):
        (tmp_path / "saved" / "dataset_dict.json").write_text(content)
        with pytest.raises(ValueError, match=rf"dataset_dict\.json ?{message}"):
            read_sources([tmp_path / "saved"])
    with pytest.raises(FileNotFoundError):
        read_sources([tmp_path / "missing.lst"])
    with pytest.raises(ValueError, match="two clips have the key"):
        read_sources([clips_by_language, clips_by_language])
    with pytest.raises(ValueError, match="list_audio='both'; accepted: 'prompt' or 'target'"):
        read_sources([clips_by_language], list_audio="both")


# --- evaluation ---


def test_scores_are_those_of_each_clip(clips_by_language, tiny_model, speaker_model):
    clips = read_sources([clips_by_language])
    verifier = SpeakerVerifier(speaker_model)
    evaluation = evaluate(
        tiny_model, clips, [20, 8], metrics=WITHOUT_PESQ, speaker_verifier=verifier, num_workers=1, max_batch_seconds=2
    )
    assert evaluation.failures == {}
    assert [(clip.key, clip.num_quantizers) for clip in evaluation.clips] == [
        (str(clips_by_language / name), count)
        for names in (["en/c.wav"], ["zh/a.wav"], ["zh/more/b.flac"])
        for count in (8, 20)
        for name in names
    ]
    all_codes = []
    for scored in evaluation.clips:
        waveform = load_audio(scored.key)
        (codes,) = encode_waveforms(tiny_model, [waveform], scored.num_quantizers)
        (decoded,) = decode_codes(tiny_model, [codes])
        decoded = decoded[: len(waveform)]
        # Batches of other sizes round otherwise.
        assert scored.scores == {
            "stoi": pytest.approx(stoi(waveform, decoded, RATE), abs=1e-4),
            "mel_distance": pytest.approx(mel_distance(waveform, decoded, RATE), abs=1e-4),
            "speaker_similarity": pytest.approx(verifier.similarity(waveform, decoded, RATE), abs=1e-4),
        }
        assert (scored.reasons, scored.seconds) == ({}, len(waveform) / RATE)
        if scored.num_quantizers == 20:
            all_codes.append(codes)
    assert evaluation.codebooks == codebook_use(all_codes, tiny_model.config.codebook_sizes)
    assert evaluation.bitrates == {8: 1550, 20: 3650}
    assert list(evaluation.real_time_factors) == [8, 20]
    assert evaluation.metrics == ["speaker_similarity", "stoi", "mel_distance"]
    two = [clip.scores["stoi"] for clip in evaluation.clips if clip.subset == "zh" and clip.num_quantizers == 8]
    mean = evaluation.mean("stoi", "zh", 8)
    assert (mean.value, mean.clips) == (pytest.approx(sum(two) / 2), 2)


def test_work_on_a_batch(clips_by_language, tiny_model, speaker_model, monkeypatch):
    """Workers get nothing while the model runs on their cores; the embedding of a recording is made once."""
    work: list[str] = []

    def telling(name: str, function: Callable) -> Callable:
        return lambda *args, **options: work.append(name) or function(*args, **options)

    for name in ("encode_waveforms", "decode_codes", "_submit_scores"):
        monkeypatch.setattr(f"mimo_audio_hf.evaluation.{name}", telling(name, getattr(evaluation_module, name)))
    verifier = SpeakerVerifier(speaker_model)
    monkeypatch.setattr(verifier, "embedding", telling("embedding", verifier.embedding))
    clips = list(read_sources([clips_by_language / "zh"]))
    evaluate(tiny_model, clips, [8, 20], metrics=["mel_distance"], speaker_verifier=verifier, num_workers=1)
    once = ["_submit_scores", "embedding", "embedding", "embedding"]
    converted = ["encode_waveforms", "decode_codes"]
    assert work == [*converted, *converted, "decode_codes", *once, *once]  # the first, unmeasured


def test_real_time_factor(clips_by_language, tiny_model, monkeypatch):
    now = 0.0

    def lasting(seconds: Callable[[list[torch.Tensor]], float], function: Callable) -> Callable:
        def run(model: object, clips: list[torch.Tensor], *args: object, **options: object) -> object:
            nonlocal now
            now += seconds(clips)
            return function(model, clips, *args, **options)

        return run

    monkeypatch.setattr(evaluation_module, "time", SimpleNamespace(perf_counter=lambda: now))
    encode, decode = lasting(lambda clips: 5, encode_waveforms), lasting(lambda clips: clips[0].shape[1], decode_codes)
    monkeypatch.setattr(evaluation_module, "encode_waveforms", encode)
    monkeypatch.setattr(evaluation_module, "decode_codes", decode)
    clips = list(read_sources([clips_by_language / "zh"]))
    evaluation = evaluate(tiny_model, clips, [8, 20], metrics=["mel_distance"], num_workers=1)
    seconds = 60001 / RATE
    assert evaluation.real_time_factors == {8: pytest.approx(13 / seconds), 20: pytest.approx(25 / seconds)}


def test_what_a_metric_has_no_memory_for_is_left_out(clips_by_language, tiny_model, speaker_model, monkeypatch):
    verifier = SpeakerVerifier(speaker_model)

    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(verifier, "embedding", fail)
    clips = list(read_sources([clips_by_language / "en"]))
    (clip,) = evaluate(
        tiny_model, clips, [8], metrics=["mel_distance"], speaker_verifier=verifier, num_workers=1
    ).clips
    assert list(clip.scores) == ["mel_distance"]
    assert clip.reasons == {"speaker_similarity": "out of memory"}


def test_nothing_is_computed_after_an_error():
    with pytest.raises(KeyError), worker_pool(1, evaluation_module.__name__) as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN  # they are not interrupted
        futures = [pool.submit(time.sleep, 0.01) for _ in range(1000)]
        raise KeyError
    assert futures[-1].cancelled()


def test_workers_use_one_thread_each_and_end_with_their_process():
    script = """
import os
import threadpoolctl
import torch
from mimo_audio_hf.evaluation import _limit_threads
from mimo_audio_hf.workers import worker_pool

if __name__ == "__main__":
    with worker_pool(1, "mimo_audio_hf.evaluation", _limit_threads) as pool:
        libraries = pool.submit(threadpoolctl.threadpool_info).result()
        print({each["num_threads"] for each in libraries}, pool.submit(torch.get_num_threads).result(), flush=True)
        os.kill(os.getpid(), 9)
"""
    # The worker has the pipe, too: it has an end when all have.
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"OMP_NUM_THREADS": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=60,
    )
    assert ended.stdout == b"{1} 1\n"
    assert ended.returncode == -signal.SIGKILL


def test_command(clips_by_language, tiny_checkpoint, tmp_path, capsys):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "damaged.wav").write_bytes(b"RIFF")
    soundfile.write(bad / "silent.wav", np.zeros(RATE), RATE)
    soundfile.write(bad / "short.wav", np.full(2400, 0.1), RATE)
    out = tmp_path / "new" / "out"
    arguments = ["evaluate", str(clips_by_language), str(bad), "-o", str(out), "--num-quantizers", "8", "20"]
    arguments += ["--metrics", *WITHOUT_PESQ, "--num-workers", "1", "--model", str(tiny_checkpoint), "--device", "cpu"]
    assert main(arguments) == 1  # for the damaged clip
    captured = capsys.readouterr()
    (error,) = captured.err.splitlines()
    assert error.startswith(f"mimo-audio: error: {bad / 'damaged.wav'}: ")
    assert "evaluated 5 of 6 clips in " in captured.out

    result = json.loads((out / "evaluation.json").read_text())
    assert list(result["failures"]) == [str(bad / "damaged.wav")]
    assert result["model"]["name"] == str(tiny_checkpoint)
    assert (result["model"]["dtype"], result["speaker_model"]) == ("float32", None)
    assert torch.__version__.startswith(result["versions"]["torch"])
    assert len(result["clips"]) == 10
    assert len(result["codebooks"]) == 20
    silent = next(clip for clip in result["clips"] if clip["key"].endswith("silent.wav"))
    assert silent["reasons"] == {"stoi": "STOI: the reference is silent"}
    assert list(silent["scores"]) == ["mel_distance"]
    means = {(row["subset"], row["num_quantizers"]): row for row in result["means"]}
    assert list(means) == [(subset, count) for subset in (None, "en", "zh", "bad") for count in (8, 20)]
    assert means[None, 8]["stoi"]["clips"] == 3
    assert means["bad", 8]["stoi"] == {"mean": None, "clips": 0}
    assert means["bad", 8]["mel_distance"]["clips"] == 2
    eight = [clip for clip in result["clips"] if clip["num_quantizers"] == 8]
    expected = np.mean([clip["scores"]["stoi"] for clip in eight if clip["subset"] == "zh"])
    assert means["zh", 8]["stoi"] == {"mean": pytest.approx(expected), "clips": 2}

    table = (out / "evaluation.md").read_text()
    assert table in captured.out
    header, _, eight, twenty, *rest = table.splitlines()
    columns = [f"{subset}: {title}" for subset in ("en", "zh", "bad") for title in ("STOI", "mel distance")]
    assert header == f"| codebooks | bit/s | {' | '.join(columns)} | RTF |"
    cells = eight.strip("| ").split(" | ")
    assert cells[:2] == ["8", "1550"]
    assert cells[4] == f"{expected:.2f}"
    assert cells[6] == "-"
    assert twenty.startswith("| 20 | 3650 | ")
    assert "Without STOI: 2 of 10 decoded clips (STOI: the reference is silent)." in rest
    assert f"Failed: {result['failures'][str(bad / 'damaged.wav')]}." in rest
    assert rest[-20].startswith("| 0 | 1024 | ")

    image = imread(out / "evaluation.png")
    assert image.shape[:2] == (480, 960)  # two panels
    assert image.std() > 0.01

    assert main(["evaluate", str(bad), "-o", str(out / "evaluation.md" / "new")]) == 1  # before anything is done
    assert f"{out / 'evaluation.md'}: cannot be written to; accepted: a folder" in capsys.readouterr().err

    assert main(arguments) == 1  # nothing is overwritten
    assert f"{out / 'evaluation.json'} exists; accepted: a folder without" in capsys.readouterr().err


def test_command_on_a_list(clips_by_language, tiny_checkpoint, tmp_path, capsys):
    listed = clips_by_language / "meta.lst"
    listed.write_text("1|text|zh/a.wav|text\n2|text|zh/a.wav|text\n3|text|gone.wav|text\n4|nothing\n")
    arguments = ["evaluate", str(listed), "-o", str(tmp_path), "--metrics", "mel_distance", "--num-workers", "1"]
    assert main([*arguments, "--model", str(tiny_checkpoint), "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "evaluated 1 of 3 clips" in captured.out
    assert f"mimo-audio: error: {listed}/line 4: 2 fields" in captured.err
    assert f"mimo-audio: error: {clips_by_language / 'gone.wav'}: No such file or directory" in captured.err


def test_bad_arguments(clips_by_language, tiny_model, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    clips = read_sources([clips_by_language])
    for options, message in (
        ({"num_quantizers": [8, 21]}, "num_quantizers=21; accepted: 1 to 20"),
        ({"metrics": []}, "there are no metrics"),
        ({"clips": [Clip("a", "set", "gone.wav")] * 2}, "two clips have the key 'a'"),
        ({"metrics": ["mos"]}, "metric 'mos'; accepted: pesq_nb, pesq_wb, stoi, mel_distance"),
        ({"num_workers": 0}, "num_workers=0; accepted: 1 or more"),
        ({"clips": []}, "none of 0 clips could be evaluated; .*there are none"),
        ({"clips": [Clip("gone", "set", "gone.wav")]}, "none of 1 clips could be evaluated; .* gone.wav"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(tiny_model, **{"clips": clips, "metrics": ["mel_distance"], "num_workers": 1} | options)

    training = load_model("tiny", device="cpu").train()
    with pytest.raises(ValueError, match="in training mode"):
        evaluate(training, clips, metrics=["mel_distance"], num_workers=1)

    monkeypatch.setitem(sys.modules, "pesq", None)
    command = ["evaluate", str(clips_by_language), "-o", str(tmp_path), "--model", str(tiny_checkpoint)]
    assert main(command) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error == "mimo-audio: error: the package pesq is not installed; accepted: pip install 'mimo-audio-hf[eval]'"
    assert not any(tmp_path.iterdir())


def test_a_worker_that_dies_is_named():
    future: Future = Future()
    future.set_exception(BrokenProcessPool())
    pending = _PendingScores("name", "set", 1.0, 8, future, None)
    with pytest.raises(OSError, match="a worker process died at or near name"):
        pending.result()


def test_means_leave_out_what_is_not_defined():
    scores = [{"stoi": 0.5}, {}, {"stoi": 1.0}]
    clips = [ClipScores(str(i), "set", 1.0, 8, each, {} if each else {"stoi": "x"}) for i, each in enumerate(scores)]
    evaluation = Evaluation(
        {"name": "m", "dtype": "d", "device": "c"}, ["stoi"], None, clips, {}, [], {8: 1.0}, {8: 1.0}
    )
    assert evaluation.mean("stoi", "set", 8).value == 0.75
    assert evaluation.mean("stoi", "set", 8).clips == 2
    assert math.isnan(evaluation.mean("stoi", "other", 8).value)


def test_many_subsets_are_rows(tmp_path):
    clips = [ClipScores(f"{i}", f"set{i}", 1.0, 8, {"stoi": i / 10}, {}) for i in range(6)]
    evaluation = Evaluation(
        {"name": "m", "dtype": "d", "device": "c"}, ["stoi"], None, clips, {}, [], {8: 1.0}, {8: 2}
    )
    header, _, everything, *rows = evaluation.to_markdown().split("\n\n")[0].splitlines()
    assert header == "| set | codebooks | bit/s | STOI | RTF |"
    assert everything == "| all | 8 | 1 | 0.25 | 2.0000 |"
    assert rows == [f"| set{i} | 8 | 1 | {i / 10:.2f} | 2.0000 |" for i in range(6)]
    evaluation.save_plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


@pytest.mark.filterwarnings("ignore:Glyph")  # matplotlib's own font has no Chinese
def test_names_in_the_report(tmp_path):
    clips = [ClipScores(name, name, 1.0, 8, {"stoi": 0.5}, {}) for name in ("a|b", "$x_$", "中文")]
    failures = {f"{i}.wav": "x" for i in range(12)} | {"k.wav": "k.wav: No such file"}
    evaluation = Evaluation(
        {"name": "m", "dtype": "d", "device": "c"}, ["stoi"], None, clips, failures, [], {8: 1.0}, {8: 2}
    )
    table, *notes = evaluation.to_markdown().split("\n\n")
    assert table.splitlines()[0] == "| codebooks | bit/s | a\\|b: STOI | $x_$: STOI | 中文: STOI | RTF |"
    assert "a|b: 1 clip, " in notes[0]
    assert [note for note in notes if note.startswith("Failed")] == [
        *(f"Failed: {i}.wav: x." for i in range(10)),
        "Failed: 3 more, in evaluation.json.",
    ]
    evaluation.save(tmp_path)
    assert list(json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))["failures"]) == list(failures)
