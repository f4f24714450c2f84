"""Reading, resampling and writing audio.

The tokenizer works on mono float32 at 24 kHz. [`load_audio`] brings any file there, [`save_audio`] writes
what comes back. Files go through soundfile (libsndfile), whose wheels carry their own decoders: nothing else has to
be installed.

libsndfile is lenient where a speech dataset is better served by an error: it shortens a truncated WAV or OGG without
a word, and takes a guess for the length of an MP3 that does not state it. The helpers below close these holes.
"""

from __future__ import annotations

import functools
import io
import math
import numbers
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
import soundfile as sf
import torch

from .files import replacing, require_regular_file


class AudioDecoder(Protocol):
    """What [`load_audio`] needs of a torchcodec ``AudioDecoder`` (or of the one that ``datasets`` hands out)."""

    def get_all_samples(self) -> Any:
        """Return an object with ``data``, a (channels, samples) tensor, and ``sample_rate`` in Hz."""


AudioSource = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | AudioDecoder

# The filter that torchaudio.functional.resample uses by default.
_LOWPASS_FILTER_WIDTH = 6
_ROLLOFF = 0.99

_READ_ELEMENTS = 2**14  # samples x channels decoded at a time; how precisely a decoding error can be located
_WRITE_SAMPLES = 2**18  # at a time, in bounded memory
_LOSSY_SAMPLES = 4096  # the OGG encoder keeps a whole write on the stack: 90 s in one go are a segmentation fault
_JOINT_ELEMENTS = 2**18  # the largest filter of all phases together: 2 MB
_RESAMPLE_ELEMENTS = 2**18  # samples gathered at a time, few enough to stay in the processor's cache

_UNKNOWN_FRAMES = 2**63 - 1  # libsndfile's SF_COUNT_MAX: the file does not say how long it is
_SYSTEM_ERROR = 2  # libsndfile's SF_ERR_SYSTEM: a full disk, for one

_PLAUSIBLE_RATES = (1_000, 1_000_000)  # Hz
_ACCEPTED = "accepted: a WAV, FLAC, OGG or MP3 file, or another that libsndfile reads"

AUDIO_FORMATS = {  # extension: libsndfile's format and subtype
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}
# Of the files that are looked for in folders.
AUDIO_SUFFIXES = (*AUDIO_FORMATS, ".aif", ".aiff", ".au", ".caf", ".opus", ".w64")


def load_audio(source: AudioSource, sampling_rate: int = 24000) -> torch.Tensor:
    """Read audio as mono samples at a given rate: the channels are averaged, then resampled.

    A file is decoded in blocks, of which only the mean over the channels is kept.

    Args:
        source: a path; the bytes of a file; a binary file object, read from its start and left open; or a torchcodec
            ``AudioDecoder``, which is recognised by its ``get_all_samples`` method.
        sampling_rate: the rate of the result, in Hz.

    Returns:
        (samples,) float32 tensor on the CPU, nominally in [-1, 1].

    Raises:
        FileNotFoundError: there is no file at that path.
        ValueError: the audio cannot be decoded, has no samples, holds NaN or infinity, or is incomplete. The last
            cannot be told of an MP3 without a Xing header, nor of AU, CAF and W64: these give what there is. Also for
            rates under 1 kHz or over 1 MHz, for a ``sampling_rate`` that is no positive integer, and for a path that
            is a directory's, a pipe's or a device's.
        TypeError: ``source`` is none of the above.
    """
    if not isinstance(sampling_rate, numbers.Integral) or sampling_rate <= 0:
        raise ValueError(f"sampling_rate must be a positive number of Hz, an integer, got {sampling_rate!r}")
    if hasattr(source, "get_all_samples"):
        name = type(source).__name__
        decoded = source.get_all_samples()
        samples, rate = as_tensor(f"{name}'s data", decoded.data), int(decoded.sample_rate)
        if samples.ndim not in (1, 2):
            shape = tuple(samples.shape)
            raise ValueError(f"{name}: data of shape {shape}; accepted: (samples,) or (channels, samples)")
        samples = samples.to(device="cpu", dtype=torch.float32)
        samples = samples.mean(dim=0) if samples.ndim == 2 else samples
    elif isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        require_regular_file(name, _ACCEPTED)
        with open(name, "rb") as file:
            samples, rate = _decode(file, name)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        name = "bytes"
        samples, rate = _decode(io.BytesIO(source), name)
    elif hasattr(source, "read") and not isinstance(source, io.TextIOBase):
        name = str(getattr(source, "name", type(source).__name__))
        samples, rate = _decode(source, name)
    else:
        raise TypeError(
            f"cannot read audio from {type(source).__name__}; "
            "accepted: a path, bytes, a binary file object or a torchcodec AudioDecoder"
        )

    if not len(samples):
        raise ValueError(f"{name}: no samples; accepted: audio of at least one sample")
    if not is_finite(samples):
        raise ValueError(f"{name}: NaN or infinite samples; accepted: finite samples")
    require_plausible_rate(name, rate)
    resampled = resample(samples, rate, sampling_rate)
    if resampled is not samples and not is_finite(resampled):
        raise ValueError(f"{name}: too loud to be resampled in float32; accepted: samples of about -1 to 1")
    return resampled


def require_plausible_rate(name: str, rate: int) -> None:
    """Refuse rates that only damaged headers have: a file of 1 Hz would become 24,000 times as long.

    Raises:
        ValueError: the rate is one of these; the message begins with `name`.
    """
    low, high = _PLAUSIBLE_RATES
    if not low <= rate <= high:
        raise ValueError(f"{name}: a sampling rate of {rate} Hz; accepted: {low} to {high} Hz")


def is_finite(samples: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity in it. (`isfinite` takes as much memory again, of an hour 0.4 GB.)"""
    return all(math.isfinite(extreme) for extreme in samples.aminmax())


def as_tensor(name: str, value: Any) -> torch.Tensor:
    """A tensor itself, or an array as a tensor.

    Raises:
        ValueError: neither, or an array of a kind that torch does not have; the message begins with `name`.
    """
    if isinstance(value, torch.Tensor):
        return value
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{name} is a {type(value).__name__}; accepted: a torch.Tensor or a numpy array")
    try:
        # A copy, since torch has no read-only tensors and no negative strides.
        return torch.from_numpy(np.array(value, order="C"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is an array of {value.dtype}; accepted: a dtype that torch has") from error


def resample(waveform: torch.Tensor, orig_freq: int, new_freq: int) -> torch.Tensor:
    """Change the sampling rate with a Hann-windowed sinc filter.

    The same filter as ``torchaudio.functional.resample`` with its defaults. It is written out here because the last
    release of torchaudio cannot be imported beside a torch without CUDA, or with another CUDA than its own, and
    because it stores for every phase of the filter all the taps that any phase needs: gigabytes for 22051 -> 24000
    Hz. Here, at such rates, a phase has its own taps only, and the work goes in chunks of bounded memory.

    The filter is computed in float64 and then rounded. torchaudio computes it in the dtype of the waveform, which for
    float32 costs it up to 2e-5 of full scale at common rates; in float64 the two agree to 1e-15.

    Args:
        waveform: (..., samples), float32 or float64, on any device.
        orig_freq: its rate in Hz.
        new_freq: the rate of the result in Hz.

    Returns:
        (..., ceil(samples * new_freq / orig_freq)) of the same dtype, on the same device; ``waveform`` itself if the
        rates are equal.

    Raises:
        ValueError: a rate is not positive.
        TypeError: ``waveform`` is neither float32 nor float64, or a rate is not an integer.
    """
    if orig_freq <= 0 or new_freq <= 0:
        raise ValueError(f"sampling rates must be positive, got {orig_freq} and {new_freq} Hz")
    if waveform.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"waveform must be float32 or float64, got {waveform.dtype}")
    gcd = math.gcd(orig_freq, new_freq)
    orig, new = orig_freq // gcd, new_freq // gcd
    if orig == new or waveform.shape[-1] == 0:
        return waveform

    rows = waveform.reshape(math.prod(waveform.shape[:-1]), waveform.shape[-1])
    length = -(-waveform.shape[-1] * new // orig)
    resampled = _resample_by_products if _joint_taps(orig, new) * new <= _JOINT_ELEMENTS else _resample_by_phases
    return resampled(rows, orig, new, length).reshape(*waveform.shape[:-1], length)


def save_audio(path: str | os.PathLike[str], waveform: torch.Tensor | np.ndarray, sampling_rate: int) -> None:
    """Write mono audio to a file in the format of its extension: .wav or .flac (both 16 bit), .ogg or .mp3.

    The file appears under its name only once complete; until then an existing one stays as it is. Missing parent
    directories are created.

    Args:
        path: where to write.
        waveform: (samples,) or (1, samples), of any floating dtype, on any device. Values beyond [-1, 1] are clipped.
        sampling_rate: its rate in Hz.

    Raises:
        ValueError: an extension other than these, a ``waveform`` that is empty, of another shape or dtype, or not
            finite, or a ``sampling_rate`` that the format does not have.
        OSError: the file cannot be written.
    """
    path = Path(path)
    _check_suffix(path)
    # Checked before anything is touched.
    samples = _samples_to_write(str(path), waveform, sampling_rate)
    with audio_writer(path, sampling_rate) as write:
        write(samples)


@contextmanager
def audio_writer(path: str | os.PathLike[str], sampling_rate: int) -> Iterator[Callable[[torch.Tensor], None]]:
    """Writes a file as [`save_audio`] does, of audio that comes in pieces: what it gives takes (samples,), floats.

    The file appears under its name at the end of the block, if that raises nothing.

    Raises:
        ValueError, OSError: as [`save_audio`], at the beginning for what is known then.
    """
    path = Path(path)
    _check_suffix(path)
    with replacing(path) as temporary:
        temporary.touch(exist_ok=False)  # says why it fails, unlike libsndfile
        with _writer(temporary, sampling_rate, path.suffix.lower(), str(path)) as write:
            yield write


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in AUDIO_FORMATS:
        raise ValueError(f"{path}: unsupported extension {path.suffix!r}; accepted: {', '.join(AUDIO_FORMATS)}")


def encode_audio(waveform: torch.Tensor | np.ndarray, sampling_rate: int, audio_format: str) -> bytes:
    """The bytes of the file that [`save_audio`] writes.

    Args:
        waveform, sampling_rate: as in [`save_audio`].
        audio_format: "wav", "flac", "ogg" or "mp3".
    """
    suffix = f".{audio_format}"
    if suffix not in AUDIO_FORMATS:
        accepted = ", ".join(repr(name[1:]) for name in AUDIO_FORMATS)
        raise ValueError(f"audio_format={audio_format!r}; accepted: {accepted}")
    file = io.BytesIO()
    samples = _samples_to_write("audio", waveform, sampling_rate)
    with _writer(file, sampling_rate, suffix, "audio") as write:
        write(samples)
    return file.getvalue()


def _samples_to_write(name: str, waveform: torch.Tensor | np.ndarray, sampling_rate: int) -> torch.Tensor:
    """(samples,) on the CPU, if that is what it is."""
    if not isinstance(sampling_rate, numbers.Integral):
        raise ValueError(f"{name}: sampling_rate={sampling_rate!r}; accepted: an integer number of Hz")
    samples = as_tensor(f"{name}: waveform", waveform).detach().cpu()
    if not samples.is_floating_point():
        raise ValueError(f"{name}: waveform is {samples.dtype}; accepted: a floating dtype")
    if not samples.numel() or samples.shape not in ((samples.numel(),), (1, samples.numel())):
        shape = tuple(samples.shape)
        raise ValueError(f"{name}: waveform has shape {shape}; accepted: (samples,) or (1, samples), not empty")
    if not is_finite(samples):
        raise ValueError(f"{name}: NaN or infinite samples; accepted: finite samples")
    return samples.reshape(-1)


@contextmanager
def _writer(
    target: Path | BinaryIO, sampling_rate: int, suffix: str, name: str
) -> Iterator[Callable[[torch.Tensor], None]]:
    """What writes samples in a format of [`AUDIO_FORMATS`]; errors call the target by `name`."""
    file_format, subtype = AUDIO_FORMATS[suffix]
    try:
        with sf.SoundFile(target, "w", sampling_rate, 1, subtype, format=file_format) as file:

            def write(samples: torch.Tensor) -> None:
                for block in samples.split(_WRITE_SAMPLES if subtype == "PCM_16" else _LOSSY_SAMPLES):
                    block = block.to(torch.float32).clamp(-1, 1)  # the lossy encoders do not clip
                    if subtype == "PCM_16":
                        # libsndfile would round towards minus infinity in a WAV.
                        block = (block * 2**15).round().clamp(max=2**15 - 1).to(torch.int16)
                    file.write(block.numpy())

            yield write
    except sf.LibsndfileError as error:
        kind = OSError if error.code == _SYSTEM_ERROR else ValueError
        raise kind(
            f"{name}: cannot be written as {file_format} at {sampling_rate} Hz: {error.error_string}"
        ) from error


def _resample_by_products(rows: torch.Tensor, orig: int, new: int, length: int) -> torch.Tensor:
    """All phases at once, as matrix products: fast for common rates, whose phases are few."""
    weights = _on_device_of(rows, _joint_filter_weights(orig, new))
    taps = weights.shape[1]
    before = _filter_weights(orig, new).shape[1] // 2 - 1
    steps = -(-length // new)
    output = rows.new_empty(len(rows), steps, new)
    step = max(1, _RESAMPLE_ELEMENTS // max(1, len(rows) * taps))
    for start in range(0, steps, step):
        stop = min(start + step, steps)
        section = _section(rows, start * orig - before, (stop - 1) * orig - before + taps)
        output[:, start:stop] = section.unfold(-1, taps, orig) @ weights.t()  # a view, not a copy
    return output.flatten(1)[:, :length]


def _resample_by_phases(rows: torch.Tensor, orig: int, new: int, length: int) -> torch.Tensor:
    """Each phase with its own taps only: in bounded memory for rates without a large common divisor."""
    weights = _on_device_of(rows, _filter_weights(orig, new))
    taps = weights.shape[1]
    half = taps // 2
    output = rows.new_empty(len(rows), length)
    step = max(1, _RESAMPLE_ELEMENTS // max(1, len(rows) * taps))
    for start in range(0, length, step):
        index = torch.arange(start, min(start + step, length), device=rows.device)
        first, last = start * orig // new, (start + len(index) - 1) * orig // new
        # windows[:, i] are the inputs first + i - (half - 1) ... first + i + half; a view, not a copy.
        windows = _section(rows, first - (half - 1), last + half + 1).unfold(-1, taps, 1)
        output[:, start : start + step] = (windows[:, index * orig // new - first] * weights[index % new]).sum(-1)
    return output


def _section(rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Samples `start` to before `stop` of each waveform, zero outside of it."""
    inside = rows[:, max(0, start) : max(0, stop)]
    return torch.nn.functional.pad(
        inside, (min(max(0, -start), stop - start), max(0, stop - max(start, rows.shape[1])))
    )


def _on_device_of(rows: torch.Tensor, weights: np.ndarray) -> torch.Tensor:
    # Kept as an array, not as a tensor: one made under torch.inference_mode could not serve a backward pass later.
    # Rounded before it is moved, for devices without float64.
    return torch.from_numpy(weights).to(rows.dtype).to(rows.device)


def _joint_taps(orig: int, new: int) -> int:
    """Inputs from the first tap of the first phase to the last tap of the last one."""
    width = math.ceil(_LOWPASS_FILTER_WIDTH * orig / (min(orig, new) * _ROLLOFF))
    return 2 * width + 2 + (new - 1) * orig // new


@functools.lru_cache(maxsize=8)
def _joint_filter_weights(orig: int, new: int) -> np.ndarray:
    """[`_filter_weights`] as a matrix (new, joint taps) over the inputs that any of the phases needs."""
    weights = _filter_weights(orig, new)
    joint = np.zeros((new, _joint_taps(orig, new)))
    for phase, row in enumerate(weights):
        start = phase * orig // new
        joint[phase, start : start + len(row)] = row
    return joint


@functools.lru_cache(maxsize=8)
def _filter_weights(orig: int, new: int) -> np.ndarray:
    """The polyphase filter from ``orig`` to ``new`` Hz, which have no common divisor.

    Returns:
        (new, taps) float64. Output sample m is the sum over i of row ``m % new`` times the inputs
        ``m * orig // new - (taps // 2 - 1) + i``: the two-sided support of the filter around the output's own place
        between the inputs, so that few of the taps are zero.
    """
    cutoff = min(orig, new) * _ROLLOFF
    width = math.ceil(_LOWPASS_FILTER_WIDTH * orig / cutoff)
    phase = np.arange(new)[:, None]
    tap = phase * orig // new + np.arange(-width, width + 2)
    time = ((tap / orig - phase / new) * cutoff).clip(-_LOWPASS_FILTER_WIDTH, _LOWPASS_FILTER_WIDTH)
    window = np.cos(time * np.pi / _LOWPASS_FILTER_WIDTH / 2) ** 2
    return np.sinc(time) * window * cutoff / orig


class _SequentialFile(sf.SoundFile):
    """A SoundFile that is only read onwards.

    SoundFile seeks after every read of a seekable file, which fails at the end of a FLAC of unknown length (as ffmpeg
    writes it to a pipe) and hides the decoder's own error in a truncated one.
    """

    def seekable(self) -> bool:
        return False


def _decode(file: BinaryIO, name: str) -> tuple[torch.Tensor, int]:
    """The mean over the channels, (samples,) float32, of a whole file, and its rate in Hz."""
    try:
        file.seek(0)
    except (AttributeError, OSError):  # a pipe; libsndfile has to seek
        file = io.BytesIO(file.read())
    try:
        sound = _SequentialFile(_prepare(file, name))
    except (sf.SoundFileError, TypeError) as error:  # TypeError: a name in .raw, for which soundfile wants a format
        raise ValueError(f"{name}: cannot be decoded: {getattr(error, 'error_string', error)} {_ACCEPTED}") from error

    # Grown in place, which for what is large moves nothing: an hour is not to be held twice.
    array = np.empty(0, dtype=np.float32)
    decoded = 0
    failure: sf.SoundFileError | None = None
    with sound:
        try:
            while len(block := sound.read(_READ_ELEMENTS // sound.channels, dtype="float32", always_2d=True)):
                if decoded + len(block) > len(array):
                    array.resize(max(decoded + len(block), len(array) * 9 // 8), refcheck=False)
                array[decoded : decoded + len(block)] = block[:, 0] if sound.channels == 1 else block.mean(axis=1)
                decoded += len(block)
        except sf.SoundFileError as error:
            failure = error
        array.resize(decoded, refcheck=False)
        samples = torch.from_numpy(array)
        promised = None if sound.frames == _UNKNOWN_FRAMES else sound.frames
        if failure or (promised is not None and len(samples) < promised):
            raise ValueError(
                f"{name}: truncated or damaged: its header promises {promised or 'an unstated number of'} samples, "
                f"{'about ' if failure else ''}{len(samples)} could be decoded; accepted: whole files"
            ) from failure
        if sound.format == "MP3":
            _require_mp3_end(file, name, len(samples))
        return samples, sound.samplerate


def _prepare(file: BinaryIO, name: str) -> BinaryIO:
    """Check that a file is complete where libsndfile does not, and return what libsndfile is to read for it."""
    magic = file.read(4)
    file.seek(0)
    if magic in (b"RIFF", b"RIFX", b"RF64", b"FORM"):
        file = _require_whole_chunks(file, name)
    elif magic == b"OggS":
        _require_whole_pages(file, name)
    else:
        file = _with_mp3_length(file)
    file.seek(0)
    return file


def _require_whole_chunks(file: BinaryIO, name: str) -> BinaryIO:
    """Check that a WAV, RF64 or AIFF file holds all the samples it declares.

    A program that writes to a pipe, or is stopped, leaves a size of 0 or about 2**31 or 2**32 in the header, which
    means "to the end of the file". libsndfile understands all of these but 0, for which a corrected copy is returned.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    magic = file.read(4)
    layout = ">4sI" if magic in (b"RIFX", b"FORM") else "<4sI"
    file_size = struct.unpack(layout[0] + "I", file.read(4).ljust(4, b"\0"))[0]
    long_size = 0  # of an RF64, whose data chunk may be too long for 32 bits
    start = 12
    while start + 8 <= end:
        file.seek(start)
        chunk, size = struct.unpack(layout, file.read(8))
        start += 8
        if chunk == b"ds64":
            long_size = struct.unpack("<8xQ", file.read(16).ljust(16, b"\0"))[0]
        elif chunk in (b"data", b"SSND"):
            streamed = size > 4096 and min(size % 2**31, -size % 2**31) <= 4096
            if size == 0xFFFFFFFF and long_size:
                size, streamed = long_size, False
            if size > end - start and not streamed:
                raise ValueError(
                    f"{name}: truncated: its header promises {size} bytes of samples, there are {end - start}; "
                    "accepted: whole files"
                )
            # With a RIFF that goes on after the data chunk, the chunk is truly empty.
            unset = file_size + 8 <= start or file_size == 0xFFFFFFFF
            if size == 0 and start < end and unset and magic in (b"RIFF", b"RIFX"):
                file.seek(0)
                file = io.BytesIO(file.read())
                file.getbuffer()[4:8] = struct.pack(layout[0] + "I", 8)  # with this libsndfile reads to the end
            break
        start += size + size % 2
    return file


def _require_whole_pages(file: BinaryIO, name: str) -> None:
    """Check that an OGG file is one stream that runs to its end-of-stream page.

    libsndfile takes the last page it finds for the end, and drops what follows the first of several streams.
    """
    end = file.seek(0, os.SEEK_END)
    position = file.seek(0)
    streams = 0
    complete = False
    while len(header := file.read(27)) == 27 and header.startswith(b"OggS"):
        flags, segments = header[5], header[26]
        position = file.seek(sum(file.read(segments)), os.SEEK_CUR)
        streams += bool(flags & 2)
        complete = bool(flags & 4) and position <= end
    if not complete:
        raise ValueError(
            f"{name}: truncated or damaged: no end-of-stream page in {position} of {end} bytes; accepted: whole files"
        )
    if streams != 1:
        raise ValueError(f"{name}: {streams} OGG streams in one file; accepted: a single stream")


def _with_mp3_length(file: BinaryIO) -> BinaryIO:
    """Make libsndfile count the frames of an MP3 that does not state their number; another file is returned as is."""
    tag = file.read(10)
    start = 0
    if len(tag) == 10 and tag.startswith(b"ID3"):
        start = 10 + sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
    file.seek(start)
    frame = file.read(64)
    is_mp3 = len(frame) == 64 and frame[0] == 0xFF and frame[1] & 0xE0 == 0xE0
    states_length = b"Xing" in frame or b"Info" in frame
    return cast(BinaryIO, _UncountedMP3(file, start)) if is_mp3 and not states_length else file


def _require_mp3_end(file: BinaryIO, name: str, count: int) -> None:
    """Check that nothing but tags is left in an MP3 after decoding.

    libsndfile stops at the length in the first header, also when several files were joined into one.
    """
    rest = file.read(2**16).lstrip(b"\0")
    # The last frame, of up to 1441 bytes, is not read if it holds only the encoder's padding.
    if len(rest) > 1441 and not rest.startswith((b"TAG", b"APETAGEX", b"LYRICSBEGIN")):
        raise ValueError(
            f"{name}: goes on after the {count} samples that its header promises; accepted: a single MP3 stream"
        )


class _UncountedMP3:
    """An MP3 file from ``start`` on, which says that it ends there.

    libsndfile takes the length of an MP3 without a Xing header from the bit rate of its first frames and never reads
    beyond: most of a file of variable bit rate can be lost. Only with no size to go by does it count the frames.
    """

    def __init__(self, file: BinaryIO, start: int) -> None:
        self._file = file
        self._start = start

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = self._file.tell() if whence == os.SEEK_CUR else self._start
        return self._file.seek(base + offset) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)
