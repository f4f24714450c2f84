# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""Recordings of speech that Debian packages carry, made into a dataset for the `tiny` checkpoint.

    pip install av  # decodes G.722
    python recipes/tiny/prepare_data.py data/tiny
    python recipes/tiny/prepare_data.py data/tiny-compact --packages data/tiny/packages --opus --max-hours 3.1

Needs Debian's apt-get and dpkg-deb, as they are set up, and libasound2 for flite. OUT gets train.parquet and
validation.parquet (columns key, audio, text, language, speaker, source, licence, source_sampling_rate), packages/ and
statistics.md. DATA.md lists the sources with their authors and licences. What is done to the recordings is in `clean`
and `join`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
from datasets import Audio, Dataset, Value
from tqdm import tqdm

from mimo_audio_hf.audio import resample
from mimo_audio_hf.files import replacing


SAMPLING_RATE = 24000
FRAME = SAMPLING_RATE // 100

# Recordings at lower rates lack what makes consonants: telephone speech, mostly.
MIN_SOURCE_RATE = 16000

# Frames this far under a clip's loud ones are silence; margins of it are kept around the speech.
SILENCE_DB = 40.0
MARGIN_FRAMES = 8
LONGEST_PAUSE_FRAMES = 60
MIN_SECONDS = 0.25
MIN_DYNAMICS_DB = 15.0  # between speech and pauses, of clips long enough to have any
PAUSE_FRAMES = 100
MIN_PEAK = 0.02
CLIPPED_LEVEL = 0.995
MAX_CLIPPED = 2e-3

# Single words of one speaker are joined, in the order of their files, to clips of about this length.
JOINED_SECONDS = 6.0
FADE = 120

OPUS_BITRATE = 32000
OGG_BLOCK = 4096  # libsndfile's encoder keeps a whole write on the stack

# Nothing of these speakers is trained on.
VALIDATION_SPEAKERS = {
    "pocketsphinx-librivox",
    "klettres-en_GB",
    "klettres-pt_BR",
    "ktuberling-de",
    "ktuberling-uk",
    "tuxpaint-da",
}


@dataclass(frozen=True)
class Recording:
    """A file of a package, and then what is made of it."""

    key: str
    path: Path
    language: str
    speaker: str
    source: str
    licence: str
    text: str | None = None
    source_rate: int = 0
    samples: np.ndarray | None = None  # int16, at SAMPLING_RATE

    @property
    def seconds(self) -> float:
        return 0.0 if self.samples is None else len(self.samples) / SAMPLING_RATE


# --- Sources: where the packages have their recordings ---


def asterisk(root: Path, package: str) -> Iterator[Recording]:
    language = package.split("-")[3]
    licence = {"it": "CC-BY-3.0", "ru": "CC-BY-3.0"}.get(language, "CC-BY-SA-3.0")
    for path in sorted(root.rglob("*.g722")):
        if path.parent.name != "silence":
            name = "-".join(path.relative_to(root / "usr/share/asterisk/sounds").with_suffix("").parts[1:])
            yield Recording(f"asterisk-{language}-{name}", path, language, f"asterisk-{language}", package, licence)


def tux_paint(root: Path, package: str) -> Iterator[Recording]:
    for path in sorted(root.rglob("*_desc*.ogg")):
        stamp, _, language = path.stem.partition("_desc")
        language = language.removesuffix(".ogg").strip("_") or "en"
        texts = path.with_name(f"{stamp}.txt")
        text = _stamp_text(texts, language) if texts.is_file() else None
        name = "-".join(path.relative_to(root / "usr/share/tuxpaint/stamps").with_suffix("").parts)
        yield Recording(f"tuxpaint-{name}", path, language, f"tuxpaint-{language}", package, "GPL-2.0-or-later", text)


def _stamp_text(path: Path, language: str) -> str | None:
    """The first line is English, each of the others `LANGUAGE.utf8=...`."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if language == "en":
        return lines[0].strip() if lines else None
    return next((line.split("=", 1)[1].strip() for line in lines if line.startswith(f"{language}.utf8=")), None)


def fish_fillets(root: Path, package: str) -> Iterator[Recording]:
    language = package.rsplit("-", 1)[1]
    texts = {}
    # What is said is in the package with the game's levels.
    for path in unpack("fillets-ng-data", root.parent).rglob(f"dialogs_{language}.lua"):
        for match in re.finditer(r'dialogId\("([^"]+)".*\)\s*dialogStr\("(.*)"\)', path.read_text(encoding="utf-8")):
            texts[match[1]] = match[2]
    for path in sorted(root.rglob(f"sound/**/{language}/*.ogg")):
        # The second part of a name is the role: m and v are the two fish, x are effects.
        role = path.stem.split("-")[1] if path.stem.count("-") > 1 else ""
        if role == "x":
            continue
        speaker = f"fillets-{language}-{role if role in ('m', 'v') else 'others'}"
        name = f"fillets-{language}-{path.parent.parent.name}-{path.stem}"
        yield Recording(name, path, language, speaker, package, "GPL-2.0-only", texts.get(path.stem))


def klettres(root: Path, package: str) -> Iterator[Recording]:
    for path in sorted(root.rglob("*.ogg")):
        language = path.parent.parent.name
        name = f"klettres-{language}-{path.parent.name}-{path.stem}"
        yield Recording(name, path, language, f"klettres-{language}", package, "GPL-2.0-or-later")


def ktuberling(root: Path, package: str) -> Iterator[Recording]:
    for path in sorted([*root.rglob("*.ogg"), *root.rglob("*.wav")]):
        language = path.parent.name
        if "@" not in language:  # the same recordings in another alphabet
            name = f"ktuberling-{language}-{path.stem}"
            yield Recording(name, path, language, f"ktuberling-{language}", package, "GPL-2.0-or-later")


def gcin(root: Path, package: str) -> Iterator[Recording]:
    licences = {"3": "LGPL-3.0-only", "5": "CC-BY-3.0"}
    for path in sorted(root.rglob("*.ogg"), key=lambda path: (path.stem, path.parent.name)):
        speaker, syllable = path.stem, path.parent.name
        if speaker in licences:
            key = f"gcin-{speaker}-{syllable}"
            yield Recording(key, path, "zh", f"gcin-{speaker}", package, licences[speaker], syllable)


def librivox(root: Path, package: str) -> Iterator[Recording]:
    for path in sorted(root.rglob("librivox/*.wav")):
        key = f"librivox-{path.stem}"
        yield Recording(key, path, "en", "pocketsphinx-librivox", package, "BSD-2-Clause")


def flite(root: Path, package: str) -> Iterator[Recording]:
    """The package's example text, read by a synthesizer's voices, of which three are men's."""
    libraries = unpack("libflite1", root.parent) / "usr/lib"
    (library,) = {path.parent for path in libraries.rglob("libflite.so.*")}
    environment = os.environ | {"LD_LIBRARY_PATH": str(library)}
    book = (root / "usr/share/doc/flite/examples/alice").read_text(encoding="ascii")
    words = " ".join(book[book.index("CHAPTER I") :].split())
    sentences = re.findall(r"\S.{30,110}?(?:[.!?;:]['\")]*|,)(?=\s|$)", words)
    for voice in ("awb", "kal16", "rms", "slt"):
        for number, sentence in enumerate(sentences):
            path = root / f"{voice}-{number:03}.wav"
            if not path.is_file():
                with replacing(path) as temporary:
                    command = [root / "usr/bin/flite", "-voice", voice, "-t", sentence, "-o", temporary]
                    subprocess.run(command, check=True, env=environment)
            key = f"flite-{voice}-{number:03}"
            yield Recording(key, path, "en", f"flite-{voice}", package, "MIT-Festival", sentence)


SOURCES: dict[str, Callable[[Path, str], Iterator[Recording]]] = {
    **{f"asterisk-core-sounds-{language}-g722": asterisk for language in ("en", "es", "fr", "it", "ru")},
    "tuxpaint-stamps-default": tux_paint,
    "fillets-ng-data-cs": fish_fillets,
    "fillets-ng-data-nl": fish_fillets,
    "klettres-data": klettres,
    "ktuberling-data": ktuberling,
    "gcin-voice": gcin,
    "flite": flite,
    "pocketsphinx-testdata": librivox,
}


def unpack(package: str, packages: Path) -> Path:
    """Download a package, unless it is there, and unpack it."""
    packages.mkdir(parents=True, exist_ok=True)
    root = packages / package
    if not root.is_dir():
        if not any(packages.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=packages, check=True)
        (archive,) = packages.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "--extract", archive, root], check=True)
    return root


# --- What is done to a recording ---


def read(recording: Recording) -> tuple[torch.Tensor, int]:
    """(samples,) at SAMPLING_RATE, and the rate of the file."""
    if recording.path.suffix != ".g722":
        # Not load_audio, which refuses the many OGG files here whose last page is not marked as such.
        channels, rate = soundfile.read(recording.path, dtype="float32", always_2d=True)
        samples = channels.mean(1)
    else:
        import av

        with av.open(str(recording.path), format="g722") as container:
            blocks = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
            rate = container.streams.audio[0].codec_context.sample_rate
        samples = np.concatenate([np.empty(0, np.int16), *blocks]).astype(np.float32) / 2**15
    return resample(torch.from_numpy(samples), rate, SAMPLING_RATE), rate


def clean(recording: Recording) -> Recording | str:
    """The speech of a recording without the silence around it and in long pauses, or why it is dropped."""
    torch.set_num_threads(1)
    try:
        waveform, rate = read(recording)
    except soundfile.LibsndfileError as error:
        return f"unreadable: {error.error_string}"
    if rate < MIN_SOURCE_RATE:
        return f"rate under {MIN_SOURCE_RATE} Hz"
    samples = waveform.numpy()
    if len(samples) < FRAME * 10 or np.abs(samples).max() < MIN_PEAK:
        return "silent"
    if (np.abs(samples) > CLIPPED_LEVEL).mean() > MAX_CLIPPED:
        return "clipped"
    frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)
    level = 10 * np.log10((frames.astype(np.float64) ** 2).mean(1) + 1e-12)
    loud = np.percentile(level, 95)
    if len(frames) > PAUSE_FRAMES and loud - np.percentile(level, 5) < MIN_DYNAMICS_DB:
        return "noise, or no pause"
    speech = np.flatnonzero(level > loud - SILENCE_DB)
    keep = np.zeros(len(frames), dtype=bool)
    for first, last in _runs(speech, LONGEST_PAUSE_FRAMES):
        keep[max(0, first - MARGIN_FRAMES) : last + 1 + MARGIN_FRAMES] = True
    spans = _runs(np.flatnonzero(keep), 1)
    if sum(last + 1 - first for first, last in spans) * FRAME < MIN_SECONDS * SAMPLING_RATE:
        return "short"
    kept = np.concatenate([_fade(samples[first * FRAME : (last + 1) * FRAME]) for first, last in spans])
    stored = (kept.clip(-1, 1) * (2**15 - 1)).round().astype(np.int16)
    return replace(recording, samples=stored, source_rate=rate)


def _runs(frames: np.ndarray, longest_gap: int) -> list[tuple[int, int]]:
    """First and last of runs of frame numbers with gaps of at most this."""
    if not len(frames):
        return []
    breaks = np.flatnonzero(np.diff(frames) > longest_gap)
    return list(zip(frames[np.r_[0, breaks + 1]], frames[np.r_[breaks, len(frames) - 1]], strict=True))


def _fade(samples: np.ndarray) -> np.ndarray:
    faded = samples.copy()
    ramp = np.linspace(0, 1, FADE, dtype=np.float32)
    faded[:FADE] *= ramp
    faded[-FADE:] *= ramp[::-1]
    return faded


def join(recordings: list[Recording]) -> Iterator[Recording]:
    """Short recordings of one speaker and rate one after another, so that clips are worth a training crop."""
    group: list[Recording] = []
    for recording in recordings:
        if group and (
            sum(each.seconds for each in group) + recording.seconds > JOINED_SECONDS
            or (recording.source_rate, recording.licence) != (group[0].source_rate, group[0].licence)
        ):
            yield _joined(group)
            group = []
        group.append(recording)
    if group:
        yield _joined(group)


def _joined(group: list[Recording]) -> Recording:
    texts = [each.text for each in group]
    return replace(
        group[0],
        samples=np.concatenate([each.samples for each in group if each.samples is not None]),
        text=" ".join(text for text in texts if text) if all(texts) else None,
    )


# --- The dataset ---


def encode(recording: Recording, opus: bool) -> bytes:
    file = io.BytesIO()
    assert recording.samples is not None
    if opus:
        # libsndfile maps its level 0 to 256 kbit/s a channel and 1 to 6 kbit/s.
        options = {"format": "OGG", "subtype": "OPUS", "compression_level": 1 - (OPUS_BITRATE - 6000) / 250000}
    else:
        options = {"format": "FLAC", "subtype": "PCM_16"}
    with soundfile.SoundFile(file, "w", SAMPLING_RATE, 1, **options) as writer:
        for start in range(0, len(recording.samples), OGG_BLOCK):
            writer.write(recording.samples[start : start + OGG_BLOCK])
    return file.getvalue()


def choose(clips: list[Recording], seconds: float) -> list[Recording]:
    """Clips of so many seconds in all: of every speaker the same share, as far as there is so much.

    A speaker's clips are taken evenly from the whole of them.
    """
    chosen: list[Recording] = []
    speakers = by_speaker(clips)
    for number, own in enumerate(sorted(speakers.values(), key=lambda own: sum(clip.seconds for clip in own))):
        share = (seconds - sum(clip.seconds for clip in chosen)) / (len(speakers) - number)
        fraction = min(1.0, share / sum(clip.seconds for clip in own))
        chosen += [clip for index, clip in enumerate(own) if int((index + 1) * fraction) > int(index * fraction)]
    return sorted(chosen, key=lambda clip: clip.key)


def by_speaker(clips: list[Recording]) -> dict[str, list[Recording]]:
    speakers: dict[str, list[Recording]] = defaultdict(list)
    for clip in clips:
        speakers[clip.speaker].append(clip)
    return speakers


def write(path: Path, rows: list[tuple[Recording, bytes]], suffix: str) -> None:
    columns: dict[str, list] = {
        "key": [recording.key for recording, _ in rows],
        "audio": [{"bytes": data, "path": f"{recording.key}.{suffix}"} for recording, data in rows],
        **{
            name: [getattr(recording, name) for recording, _ in rows]
            for name in ("text", "language", "speaker", "source", "licence")
        },
        "source_sampling_rate": [recording.source_rate for recording, _ in rows],
        "seconds": [recording.seconds for recording, _ in rows],
    }
    # A cast, for `Audio` itself wants torchcodec to take bytes that need no encoding.
    dataset = Dataset.from_dict(columns).cast_column("audio", Audio(sampling_rate=SAMPLING_RATE))
    dataset = dataset.cast_column("text", Value("string"))
    with replacing(path) as temporary:
        dataset.to_parquet(str(temporary))


def statistics(splits: dict[str, list[tuple[Recording, bytes]]], dropped: Counter[tuple[str, str]]) -> str:
    lines = [
        "| split | source | licence | speakers | languages | clips | hours | MB |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for split, rows in splits.items():
        for source in [*dict.fromkeys(recording.source for recording, _ in rows), None]:
            own = [(recording, data) for recording, data in rows if source in (None, recording.source)]
            recordings = [recording for recording, _ in own]
            licences = ", ".join(sorted({recording.licence for recording in recordings})) if source else ""
            counts = [len({getattr(recording, name) for recording in recordings}) for name in ("speaker", "language")]
            hours = sum(recording.seconds for recording in recordings) / 3600
            cells = [split, source or "all", licences, *counts, len(own), f"{hours:.2f}"]
            lines.append(f"| {' | '.join(map(str, cells))} | {sum(len(data) for _, data in own) / 1e6:.1f} |")
    lines += ["", "Dropped files:", ""]
    lines += [f"- {source}: {number} {reason}" for (source, reason), number in sorted(dropped.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Recordings of speech from Debian packages, as a dataset.")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--packages", type=Path, help="folder of downloaded packages (default: OUT/packages)")
    parser.add_argument("--sources", nargs="+", choices=list(SOURCES), default=list(SOURCES), help="(default: all)")
    parser.add_argument("--opus", action="store_true", help=f"Opus at {OPUS_BITRATE // 1000} kbit/s instead of FLAC")
    parser.add_argument("--max-hours", type=float, help="of both files: fewer clips, evenly from all speakers")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    args = parser.parse_args()
    packages = (args.packages or args.output / "packages").resolve()

    recordings: list[Recording] = []
    for package in args.sources:
        recordings += SOURCES[package](unpack(package, packages), package)

    dropped: Counter[tuple[str, str]] = Counter()
    cleaned: list[Recording] = []
    seen: set[bytes] = set()
    with ProcessPoolExecutor(args.workers) as pool:
        done = pool.map(clean, recordings, chunksize=16)
        for recording, result in tqdm(zip(recordings, done, strict=True), total=len(recordings), unit="file"):
            if isinstance(result, str):
                dropped[recording.source, result] += 1
            elif (content := hashlib.sha256(result.samples).digest()) in seen:
                dropped[recording.source, "twice"] += 1
            else:
                seen.add(content)
                cleaned.append(result)
        clips = [clip for own in by_speaker(cleaned).values() for clip in join(own)]
        splits = {
            "train": [clip for clip in clips if clip.speaker not in VALIDATION_SPEAKERS],
            "validation": [clip for clip in clips if clip.speaker in VALIDATION_SPEAKERS],
        }
        if args.max_hours is not None:
            seconds = args.max_hours * 3600
            splits["validation"] = choose(splits["validation"], seconds / 20)
            splits["train"] = choose(splits["train"], seconds - sum(clip.seconds for clip in splits["validation"]))
        rows: dict[str, list[tuple[Recording, bytes]]] = {}
        for split, own in splits.items():
            encoded = pool.map(partial(encode, opus=args.opus), own, chunksize=16)
            rows[split] = list(tqdm(zip(own, encoded, strict=True), total=len(own), unit="clip", desc=split))
            write(args.output / f"{split}.parquet", rows[split], "opus" if args.opus else "flac")
    report = statistics(rows, dropped)
    (args.output / "statistics.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
