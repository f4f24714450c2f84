# Copyright 2026 The mimo-audio-hf authors. Licensed under the Apache License, Version 2.0.
"""A page to try a model on: `mimo-audio demo`, and the Space in `hub_card/space`. It needs gradio (extra `demo`).

The page fetches nothing from anywhere but its own server: no fonts, no scripts, no statistics.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import soundfile
import torch

from .audio import load_audio, save_audio
from .codes import SUFFIX, AudioCodes
from .feature_extraction_mimo_audio_tokenizer import MiMoAudioTokenizerFeatureExtractor
from .inference import decode_codes, encode_waveforms
from .metrics import require_package
from .modeling_mimo_audio_tokenizer import MiMoAudioTokenizerModel
from .pictures import reconstruction_figure


# Read on import. A history of runs would keep recordings in the browser.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")

require_package("gradio", "demo")
require_package("matplotlib", "demo")

import gradio as gr  # noqa: E402


if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_SECONDS = 60.0
MAX_FILE_SIZE = "50mb"

_CODEBOOKS_AT_FIRST = 8
# Seconds until clips and files of visitors are deleted, and between two looks for such: together an hour at most.
_FORGET_AFTER = 3300
_LOOK_EVERY = 300
_MAX_VISITORS = 200  # whose clips are kept: 6 MB each, if they are as long as they may be
_MAX_NAME_BYTES = 100  # of a clip's name, which a file system would not take at any length
_EMPTY = "Choose a file or record something: what comes back appears here."
# Of the system, so that none is fetched.
_FONTS: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
_CSS = """
.gradio-container { width: 100% !important; max-width: 1080px !important; margin: 0 auto !important; }
#download { font-size: 1em; font-weight: 500; }
#message { font-size: 1.1em; min-height: 1.6em; }
"""


@dataclass(frozen=True, eq=False)
class EncodedClip:
    """A visitor's clip.

    Attributes:
        name: of the file, without its extension, or the beginning of a long one.
        waveform: (samples,), at the model's sampling rate.
        codes: all codebooks.
        folder: for files made of it; goes when the clip goes.
    """

    name: str
    waveform: torch.Tensor
    codes: AudioCodes
    folder: tempfile.TemporaryDirectory[str]


@dataclass(frozen=True)
class Reconstruction:
    """What is shown of a clip: two files, a picture, and a line of text."""

    audio: Path
    codes: Path
    figure: Figure
    summary: str


class Demo:
    """What the page does, without the page.

    Args:
        model: a tokenizer with a decoder; runs where it is.
        max_seconds: longer clips are refused.

    Raises:
        ValueError: the model has no decoder.
    """

    def __init__(self, model: MiMoAudioTokenizerModel, max_seconds: float = MAX_SECONDS) -> None:
        if model.decoder is None:
            name = model.config.name_or_path or "this model"
            raise ValueError(f"{name} holds an encoder only; accepted: a model with a decoder")
        self.model = model
        self.max_seconds = max_seconds
        self.extractor = MiMoAudioTokenizerFeatureExtractor.from_config(model.config)

    def encode(self, path: str | os.PathLike[str]) -> EncodedClip:
        """Encode a file with all codebooks.

        Raises:
            ValueError: it is no audio, empty, not finite, or too long. The message has the file's name without its
                folder, which is the server's.
            OSError: it cannot be read.
        """
        path = Path(path)
        with contextlib.suppress(soundfile.SoundFileError):  # which load_audio puts into words
            # Before it is decoded: a small file may hold hours of silence.
            self._require_short(soundfile.info(path).duration, path)
        try:
            waveform = load_audio(path, self.model.config.sampling_rate)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), path.name)) from error
        self._require_short(len(waveform) / self.model.config.sampling_rate, path)
        (codes,) = encode_waveforms(self.model, [waveform])
        return EncodedClip(
            name=path.stem.encode("utf-8", "ignore")[:_MAX_NAME_BYTES].decode("utf-8", "ignore"),
            waveform=waveform,
            codes=AudioCodes.of_model(self.model.config, codes, num_samples=len(waveform)),
            folder=tempfile.TemporaryDirectory(prefix="mimo-audio-demo-"),
        )

    def reconstruct(self, clip: EncodedClip, num_quantizers: int) -> Reconstruction:
        """Decode a clip from its first codebooks.

        Raises:
            ValueError: more codebooks than there are, or none.
        """
        config = self.model.config
        books = self.model.check_num_quantizers(num_quantizers)
        kept = AudioCodes.of_model(config, clip.codes.codes[:, :books], num_samples=clip.codes.num_samples)
        started = time.perf_counter()
        (decoded,) = decode_codes(self.model, [kept.codes])
        elapsed = time.perf_counter() - started
        decoded = decoded[: kept.num_samples]
        stem = Path(clip.folder.name, f"{clip.name}-{books}-codebooks")
        audio, codes = stem.with_name(stem.name + ".wav"), stem.with_name(stem.name + SUFFIX)
        save_audio(audio, decoded, config.sampling_rate)
        kept.save(codes)
        pcm = 16 * config.sampling_rate / kept.bitrate
        return Reconstruction(
            audio=audio,
            codes=codes,
            figure=reconstruction_figure(clip.waveform, decoded, self.extractor, clip.codes, books),
            summary=f"**{kept.bitrate / 1000:.2f} kbit/s**, 1/{pcm:.0f} of 16-bit PCM: {len(kept.codes)} frames of "
            f"{books} codes for {kept.seconds:.1f} s, decoded in {elapsed:.2f} s",
        )

    def _require_short(self, seconds: float, path: Path) -> None:
        if seconds > self.max_seconds:
            raise ValueError(f"{path.name}: {seconds:.0f} s of audio; accepted: up to {self.max_seconds:g} s")


def build_page(demo: Demo, examples: Sequence[str | os.PathLike[str]] = ()) -> gr.Blocks:
    """The page, to be launched.

    Args:
        demo: what it does.
        examples: audio files that a visitor may choose; the page opens with the first one.
    """
    config = demo.model.config
    books = config.num_quantizers
    first = min(_CODEBOOKS_AT_FIRST, books)
    paths = [os.fspath(path) for path in examples]

    def shown(clip: EncodedClip | None, num_quantizers: float | None, message: str = _EMPTY) -> list[Any]:
        if num_quantizers is None:
            return [gr.skip()] * 4
        if clip is None:
            return [None, gr.Plot(visible=False), gr.DownloadButton(value=None, interactive=False), message]
        result = demo.reconstruct(clip, int(num_quantizers))
        download = gr.DownloadButton(value=result.codes, interactive=True)
        return [str(result.audio), gr.Plot(result.figure, visible=True), download, result.summary]

    def encoded(path: str | None, num_quantizers: float | None) -> list[Any]:
        num_quantizers = num_quantizers or first
        if path is None:
            return [None, *shown(None, num_quantizers)]
        try:
            clip = demo.encode(path)
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            reason = str(error).replace(os.path.dirname(path) + os.sep, "")
            return [None, *shown(None, num_quantizers, f"⚠️ **This did not work.** {' '.join(reason.split())}")]
        return [clip, *shown(clip, num_quantizers)]

    with gr.Blocks(
        title="MiMo-Audio tokenizer", analytics_enabled=False, delete_cache=(_LOOK_EVERY, _FORGET_AFTER)
    ) as page:
        gr.Markdown(
            f"# MiMo-Audio tokenizer\nSpeech to {books} codebooks at {config.frame_rate:g} frames a second, and back. "
            f"Model: `{config.name_or_path}`. How few codebooks still sound right?"
        )
        clip = gr.State(None, time_to_live=_FORGET_AFTER)
        player: dict[str, Any] = {
            "type": "filepath",
            "buttons": ["download"],
            "waveform_options": gr.WaveformOptions(waveform_color="#a5b4fc", waveform_progress_color="#4f46e5"),
        }
        with gr.Row(equal_height=True):
            recording = gr.Audio(
                value=paths[0] if paths else None,
                label=f"Recording, up to {demo.max_seconds:g} s",
                elem_id="recording",
                **player,
            )
            decoded = gr.Audio(label="Decoded", interactive=False, elem_id="decoded", **player)
        if len(paths) > 1:
            gr.Examples(paths, recording, label="Examples")
        with gr.Row(equal_height=True):
            num_quantizers = gr.Slider(
                1,
                books,
                value=first,
                step=1,
                label="Codebooks, from the first",
                buttons=[],
                elem_id="codebooks",
                scale=3,
            )
            download = gr.DownloadButton("Download the codes", interactive=False, elem_id="download", scale=1)
        # Its box is empty while a number is typed there. (Beside a class of our own gradio would write a stub file.)
        as_number = num_quantizers.preprocess
        num_quantizers.preprocess = lambda value: None if value is None else as_number(value)  # type: ignore
        message = gr.Markdown(_EMPTY, elem_id="message")
        picture = gr.Plot(show_label=False, format="png", elem_id="picture", visible=False)

        outputs = [decoded, picture, download, message]
        recording.change(encoded, [recording, num_quantizers], [clip, *outputs], api_name="encode")
        num_quantizers.change(
            shown,
            [clip, num_quantizers],
            outputs,
            api_name="decode",
            trigger_mode="always_last",
            show_progress="hidden",
        )
        if paths:
            page.load(encoded, [recording, num_quantizers], [clip, *outputs], api_visibility="private")
    return page


def serve(demo: Demo, examples: Sequence[str | os.PathLike[str]] = (), **options: Any) -> None:
    """Serve the page until it is interrupted; the options are those of gradio's `launch`.

    Raises:
        OSError: an example cannot be read, or the port is taken.
    """
    for path in examples:
        with open(path, "rb"):
            pass
    build_page(demo, examples).launch(
        theme=gr.themes.Base(primary_hue="indigo", **_FONTS),
        css=_CSS,
        footer_links=[],
        max_file_size=MAX_FILE_SIZE,
        state_session_capacity=_MAX_VISITORS,
        allowed_paths=[os.path.abspath(path) for path in examples],
        **options,
    )
