"""Fuzzing of everything that reads files from elsewhere: damaged and hostile inputs must give documented errors only.

    python tests/fuzz.py --inputs 100000 --output benchmarks/results/fuzz.json

Inputs are made from small good files by a seeded generator, so that each can be made again from its parser's name and
its number (`--only audio --first 4711 --inputs 1`). They are read in a process of its own whose memory is limited; one
that takes too long, or ends the process, is told of like any other failure. test_fuzz.py runs a few hundred of each.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import multiprocessing
import os
import platform
import random
import re
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soundfile
import torch
import transformers
import yaml
from tqdm import tqdm

from mimo_audio_hf import AudioCodes, MiMoAudioTokenizerConfig, load_audio, load_model
from mimo_audio_hf.files import replacing
from mimo_audio_hf.offline import TASKS, load_tokens, read_list
from mimo_audio_hf.sources import AUDIO_COLUMNS, JsonLinesSource, Problem
from mimo_audio_hf.training.config import TrainingConfig, read_yaml


MEMORY_LIMIT = 2**30  # bytes that reading may add to the process
TIME_LIMIT = 20.0  # seconds for one input

# Values that parsers stumble over, in JSON and in YAML.
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    7,
    127,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    -(2**63),
    0.5,
    -0.0,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1",
    "-1",
    "1e999",
    "nan",
    "null",
    "true",
    "\0",
    "\ud800",
    "ü" * 300,
    "../../etc/passwd",
    "/dev/null",
    "gelu",
    [],
    {},
    [1],
    [[1]],
    [[], [1]],
    [-1, -1],
    ["a", 1],
    [None],
    {"a": 1},
    {"": {}},
)
TOKENS = (
    [
        b"[" * 20_000,
        b'{"a":' * 20_000,
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\r",
        b"\n\n",
        b"1" * 5000,
    ]
    + [b"NaN", b"-Infinity", b"1e400", b"\\ud800", b"\\u0000", b"true", b"{}", b"[]", b'""', b",", b":", b"/*", b"//"]
    + [b"&a [*a]", b"*a", b"<<: *a", b"!!python/object/apply:os.system [x]", b"!!int ''", b"!!float ''", b"!!bool x"]
    + [
        b"!!timestamp x",
        b"!!binary x",
        b"!!set",
        b"!!omap",
        b"? []",
        b"%YAML 9.9",
        b"---",
        b"...",
        b"2001-99-99",
        b"=",
        b"0x",
    ]
)


# In documents a token stands for itself by a mark, which is exchanged when the document is written.
MARKS = tuple(f"@@{index}" for index in range(len(TOKENS)))


@dataclass(frozen=True)
class Parser:
    """What is fuzzed.

    Attributes:
        seeds: good inputs, from which bad ones are made.
        read: reads a file with an input; it is given the file's path.
        errors: what it may raise, with a message.
        named: what that message has to hold; `{path}` is the file's path.
        documents, parse: the seeds are documents, of which values are exchanged as well: how these are written and
            read.
        share: of the inputs that are asked for.
    """

    seeds: Sequence[bytes]
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...] = (ValueError,)
    named: str = "{path}"
    documents: Callable[[Any], bytes] | None = None
    parse: Callable[[bytes], Any] = json.loads
    share: float = 1.0


def make_input(parser: Parser, name: str, number: int) -> bytes:
    """The input of a number: a good one, changed in one to eight places."""
    chance = random.Random(f"{name} {number}")
    data = chance.choice(parser.seeds)
    if parser.documents is not None and chance.random() < 0.7:
        document = parser.parse(data)
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            document = _exchange(document, chance)
        data = parser.documents(document)
        if chance.random() < 0.6:
            return data
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        data = _mutate(data, parser.seeds, chance)
    return data


def _exchange(document: Any, chance: random.Random) -> Any:
    """The document with one of its values, or entries, exchanged, dropped or added."""
    if isinstance(document, dict) and document and chance.random() < 0.9:
        name = chance.choice(list(document))
        kind = chance.random()
        if kind < 0.1:
            return {other: value for other, value in document.items() if other != name}
        if kind < 0.15:
            return document | {str(chance.choice(VALUES)): chance.choice(VALUES + MARKS)}
        return document | {name: _exchange(document[name], chance)}
    if isinstance(document, list) and document and chance.random() < 0.7:
        place = chance.randrange(len(document))
        return [*document[:place], _exchange(document[place], chance), *document[place + 1 :]]
    return chance.choice(VALUES + MARKS)


def with_tokens(text: bytes) -> bytes:
    return re.sub(rb"""["']@@(\d+)["']""", lambda mark: TOKENS[int(mark[1])], text)


def _mutate(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    start = chance.randrange(len(data) + 1)
    if chance.random() < 0.5:  # headers matter most
        start = min(start, chance.randrange(128))
    stop = min(len(data), start + chance.choice((1, 1, 2, 4, 16, 256)))
    kind = chance.randrange(9)
    if kind == 0:
        return data[:start]
    if kind == 1:
        return data[:start] + data[stop:]
    if kind == 2:
        return data[:start] + chance.randbytes(stop - start) + data[stop:]
    if kind == 3:
        return data[:start] + chance.randbytes(chance.choice((1, 4, 64))) + data[start:]
    if kind == 4:
        return data[:stop] + data[start:stop] * chance.choice((1, 2, 50)) + data[stop:]
    if kind == 5:
        return data[:start] + chance.choice(seeds)[start:]
    if kind == 6:
        return data[:start] + chance.choice(TOKENS) + data[start:]
    if kind == 7 and start < len(data):
        return data[:start] + bytes([data[start] ^ 1 << chance.randrange(8)]) + data[start + 1 :]
    layout = chance.choice(("<B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
    bits = 8 * struct.calcsize(layout)
    number = chance.choice(
        (0, 1, 2, 3, 255, 1000, 24000, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1, 2**bits - 2)
    )
    packed = struct.pack(layout, number % 2**bits)
    return data[:start] + packed + data[start + len(packed) :]


def audio_seeds() -> list[bytes]:
    noise = np.random.default_rng(0).normal(scale=0.1, size=(1200, 2)).clip(-1, 1)
    kinds = [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAV", "ULAW"), ("WAV", "MS_ADPCM")]
    kinds += [("RF64", "PCM_16"), ("W64", "PCM_16"), ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "PCM_16")]
    kinds += [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]
    seeds = []
    for (container, subtype), rate in itertools.product(kinds, (8000, 24000, 44100)):
        if subtype == "OPUS" and rate == 44100:
            continue
        file = io.BytesIO()
        soundfile.write(file, noise[:, : 1 + (rate == 8000)], rate, format=container, subtype=subtype)
        seeds.append(file.getvalue())
    return seeds


def code_seeds() -> list[bytes]:
    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        for sizes in ((1024, 1024, 128), (128,), (40_000, 2)):
            codes = torch.randint(2, (6, len(sizes)))
            path = Path(folder, "codes.safetensors")
            AudioCodes(codes, sizes, 24000, 960, 5000, "owner/name").save(path)
            seeds.append(path.read_bytes())
    return seeds


def load_audio_bytes(path: Path) -> None:
    load_audio(path.read_bytes())


def read_codes(path: Path) -> None:
    codes = AudioCodes.load(path)
    assert codes.bitrate >= 0 and codes.seconds > 0


def code_header(data: bytes) -> Any:
    """A safetensors file as a document: its header, and the rest."""
    size = struct.unpack("<Q", data[:8])[0]
    return {"header": json.loads(data[8 : 8 + size]), "data": data[8 + size :].hex()}


def code_file(document: Any) -> bytes:
    """Also of documents that have lost their form."""
    document = document if isinstance(document, dict) else {}
    header = json_bytes(document.get("header"))
    try:
        data = bytes.fromhex(str(document.get("data", "")))
    except ValueError:
        data = b""
    return struct.pack("<Q", len(header)) + header + data


def json_bytes(document: Any) -> bytes:
    return with_tokens(json.dumps(document).encode())


def lines_of(documents: Any) -> bytes:
    documents = documents if isinstance(documents, list) else [documents]
    return b"\n".join(map(json_bytes, documents))


def parse_lines(data: bytes) -> Any:
    return [json.loads(line) for line in data.splitlines()]


def read_source(path: Path) -> None:
    """A list as a job reads it: its rows, and then each row's audio and other columns."""
    source = JsonLinesSource(str(path), list(AUDIO_COLUMNS))
    for unit in list(source.units()):
        rows = [row for row in unit if not isinstance(row, Problem)]
        for _ in source.read(rows):
            pass


def read_lists(path: Path) -> None:
    for task in TASKS:
        read_list(path, task)


def read_config(path: Path) -> None:
    """The config.json of a checkpoint without weights, which is all that a good one lacks; and what is derived."""
    try:
        load_model(path.parent, device="cpu")
    except ValueError as error:
        if "no file named model.safetensors" not in str(error):
            raise
    config = MiMoAudioTokenizerConfig.from_pretrained(path.parent)
    assert len(config.codebook_sizes) == config.num_quantizers
    assert config.bitrate() >= 0 and config.frame_rate > 0 and config.samples_per_frame > 0
    MiMoAudioTokenizerConfig.from_dict(json.loads(config.to_json_string()))


def read_model(path: Path) -> None:
    """A whole checkpoint: the configuration beside the weights of `tiny`."""
    weights = path.with_name("model.safetensors")
    if not weights.exists():
        weights.write_bytes(tiny(weights.name))
    load_model(path.parent, device="cpu")


def tiny(name: str) -> bytes:
    return resources.files("mimo_audio_hf").joinpath("tiny", name).read_bytes()


def read_training_options(path: Path) -> None:
    TrainingConfig.from_values(read_yaml(path))


def yaml_bytes(document: Any) -> bytes:
    return with_tokens(yaml.safe_dump(document).encode("utf-8", "surrogatepass"))


def parsers() -> dict[str, Parser]:
    """By name. Errors are those that each one's docstring states."""
    tokens = [{"quantized_tokens": [[1, 2, 3], [4, 5, 6]], "info": {"key": "a"}}, {"quantized_tokens": [[0]]}]
    clip = {"key": "a", "wav": "a.wav", "quantized_tokens": "a.json", "reconstructed_wav": "out/a.wav"}
    clips = [clip, {name: value.replace("a", "b") for name, value in clip.items()}]
    rows = [
        [
            {"key": "a", "audio": "a.wav", "text": "words", "n": 1},
            {"key": "b", "audio": "b.wav", "text": "", "n": None},
        ],
        [{"audio": {"path": "a.wav"}, "x": [1, 2]}, {"audio": {"path": "b.wav"}, "x": []}],
        [{"wav": "a.wav"}] * 3,
    ]
    configs = [
        MiMoAudioTokenizerConfig().to_dict(),
        {"d_model": 128, "encoder_attention_heads": 4, "sampling_rate": 16000},
    ]
    options: list[dict[str, Any]] = [
        {"output_dir": "run", "stage": 1, "mel_scales": [5, 6], "learning_rate": "2e-4", "metrics": ["stoi"]},
        {"output_dir": "run", "text_model_config": {"model_type": "llama"}, "max_steps": 10, "torch_compile": True},
    ]
    return {
        "audio": Parser(audio_seeds(), load_audio_bytes, named="bytes: "),
        "code files": Parser(code_seeds(), read_codes, documents=code_file, parse=code_header),
        "token files": Parser(list(map(json_bytes, tokens)), load_tokens, documents=json_bytes),
        "offline lists": Parser([lines_of(clips)], read_lists, documents=lines_of, parse=parse_lines),
        "JSON-lines sources": Parser(list(map(lines_of, rows)), read_source, documents=lines_of, parse=parse_lines),
        "config.json": Parser(
            list(map(json_bytes, configs)), read_config, named="{path.parent}", documents=json_bytes
        ),
        "config.json with weights": Parser(
            [tiny("config.json")],
            read_model,
            named="{path.parent}",
            documents=json_bytes,
            share=0.05,  # each of them makes a model
        ),
        "training YAML": Parser(
            list(map(yaml_bytes, options)),
            read_training_options,
            named="",  # an option, which may be called anything
            documents=yaml_bytes,
            parse=yaml.safe_load,
        ),
    }


def file_name(name: str) -> str:
    return {"code files": "input.safetensors"}.get(name, "config.json" if name.startswith("config.json") else "input")


def outcome(parser: Parser, path: Path) -> str:
    """ "accepted", "refused", or what went wrong."""
    try:
        parser.read(path)
    except parser.errors as error:
        named = parser.named.format(path=path)
        return (
            "refused" if named in str(error) else f"{type(error).__name__} that does not name {named!r}: {error}"[:200]
        )
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({Path(frame.filename).name}:{frame.lineno})"
    return "accepted"


def limit_memory() -> None:
    """Allocations of more than `MEMORY_LIMIT` beyond what the process has now fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_LIMIT,) * 2)


def _work(name: str, first: int, last: int, folder: str, results: Any) -> None:
    parser = parsers()[name]
    path = Path(folder, file_name(name))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders complain there
    path.write_bytes(parser.seeds[0])
    outcome(parser, path)  # what is imported and cached at the first use
    limit_memory()
    for number in range(first, last):
        data = make_input(parser, name, number)
        path.write_bytes(data)
        results.put((number, None, 0.0, 0))
        started = time.perf_counter()
        told = outcome(parser, path)
        seconds = time.perf_counter() - started
        results.put((number, told, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def fuzz(name: str, inputs: int, first: int = 0) -> dict[str, Any]:
    """Reads so many inputs. The process is started again where one of them ends it, or takes too long."""
    counts: Counter[str] = Counter()
    failures: dict[int, str] = {}
    slowest = (0.0, -1)
    peaks: list[int] = []
    context = multiprocessing.get_context("spawn")
    started = time.perf_counter()
    number, last = first, first + inputs
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, tqdm(total=inputs, desc=name, disable=None) as bar:
        while number < last:
            results: Any = context.SimpleQueue()
            worker = context.Process(target=_work, args=(name, number, last, folder, results))
            worker.start()
            began = None
            while number < last:
                deadline = time.monotonic() + (120 if began is None else TIME_LIMIT)
                while not (ready := results._reader.poll(0.1)) and worker.is_alive() and time.monotonic() < deadline:
                    pass
                if not ready and not results._reader.poll(0):
                    break
                begun, told, seconds, peak = results.get()
                if told is None:
                    began = begun
                    continue
                peaks.append(peak)
                slowest = max(slowest, (seconds, begun))
                if seconds > TIME_LIMIT:
                    told = f"took {seconds:.1f} s"
                counts[told if told in ("accepted", "refused") else "failed"] += 1
                if told not in ("accepted", "refused"):
                    failures[begun] = told
                number, began = begun + 1, begun
                bar.update()
            else:
                worker.join()
                continue
            ended = worker.is_alive()
            worker.kill()
            worker.join()
            failures[number] = (
                f"took more than {TIME_LIMIT:g} s" if ended else f"ended the process ({worker.exitcode})"
            )
            counts["failed"] += 1
            number += 1
            bar.update()
    return {
        "inputs": inputs,
        "first": first,
        **{kind: counts[kind] for kind in ("accepted", "refused", "failed")},
        "slowest_seconds": round(slowest[0], 4),
        "slowest_input": slowest[1],
        "memory_growth_mib": round((max(peaks, default=0) - min(peaks, default=0)) / 1024, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "failures": _by_kind(failures),
    }


def _by_kind(failures: dict[int, str]) -> list[dict[str, Any]]:
    """Like failures together: how many, and the first one."""
    kinds: dict[str, list[int]] = {}
    for number in sorted(failures):
        kinds.setdefault(re.sub(r"0x[0-9a-f]+|\d+|'[^']*'", "_", failures[number])[:60], []).append(number)
    return [{"what": failures[found[0]], "count": len(found), "first": found[0]} for found in kinds.values()]


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--inputs", type=int, default=100_000, help="for each parser (default: %(default)s)")
    options.add_argument("--first", type=int, default=0, help="number of the first one")
    options.add_argument("--only", choices=list(parsers()), nargs="+", help="these parsers")
    options.add_argument("--output", type=Path, help="JSON file of the results")
    args = options.parse_args()
    found = {
        name: fuzz(name, max(1, round(parser.share * args.inputs)), args.first)
        for name, parser in parsers().items()
        if args.only is None or name in args.only
    }
    document = {
        "memory_limit_mib": MEMORY_LIMIT // 2**20,
        "time_limit_seconds": TIME_LIMIT,
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, datasets, np, soundfile)},
            "libsndfile": soundfile.__libsndfile_version__,
        },
        "parsers": found,
    }
    text = json.dumps(document, indent=2) + "\n"
    print(text)
    if args.output is not None:
        with replacing(args.output) as temporary:
            temporary.write_text(text)
    return 1 if any(each["failed"] for each in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
