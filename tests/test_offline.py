"""Upstream's command: its three tasks, alone and under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mimo_audio_hf import decode_codes, encode_waveforms, load_audio, offline
from mimo_audio_hf.inference import encode_packed
from mimo_audio_hf.jobs import lost_processes_named
from mimo_audio_hf.offline import load_tokens, main, save_tokens
from mimo_audio_hf.workers import worker_pool


@pytest.fixture
def lines(tmp_path, write_audio) -> list[dict[str, str]]:
    return [
        {
            "key": f"clip{index}",
            "wav": str(
                write_audio(tmp_path / f"{index}.wav", 1000 + 777 * index, 24000 if index % 2 else 16000, index)
            ),
            "quantized_tokens": str(tmp_path / "out" / f"{index}.json"),
            "reconstructed_wav": str(tmp_path / "out" / f"{index}.wav"),
        }
        for index in range(7)
    ]


def write_list(tmp_path: Path, lines: list) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def arguments(tmp_path: Path, checkpoint: Path, lines: list, task: str) -> list[str]:
    data_list = write_list(tmp_path, lines)
    options = ["--batch_size", "3", "--num_workers", "1", "--prefetch", "2", "--num_quantizers", "20", "--task", task]
    return ["--model_path", str(checkpoint), "--data_list", data_list, *options]


def check(lines, model, tokens: bool, audio: bool) -> None:
    for line in lines:
        (codes,) = encode_waveforms(model, [load_audio(line["wav"])])
        assert Path(line["quantized_tokens"]).exists() == tokens
        assert Path(line["reconstructed_wav"]).exists() == audio
        if tokens:
            assert torch.equal(load_tokens(line["quantized_tokens"]), codes)
            assert json.loads(Path(line["quantized_tokens"]).read_text())["info"]["key"] == line["key"]
        if audio:
            (waveform,) = decode_codes(model, [codes])
            samples, rate = soundfile.read(line["reconstructed_wav"], dtype="float32")
            assert rate == 24000
            expected = waveform.clamp(-1, 1)
            torch.testing.assert_close(torch.from_numpy(samples), expected, rtol=0, atol=2**-15)  # 16 bits


def test_three_tasks_under_torchrun(tmp_path, tiny_checkpoint, tiny_model, lines):
    def launch(task: str) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += ["-m", "mimo_audio_hf.offline", *arguments(tmp_path, tiny_checkpoint, lines, task)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        assert f"{task}: 7 of 7 clips" in run.stdout

    launch("wav2token")
    check(lines, tiny_model, tokens=True, audio=False)
    launch("token2wav")
    check(lines, tiny_model, tokens=True, audio=True)
    for line in lines:
        Path(line["quantized_tokens"]).unlink()
        Path(line["reconstructed_wav"]).unlink()
    launch("wav2token2wav")
    check(lines, tiny_model, tokens=True, audio=True)


def test_token_files_are_as_json_writes_them(tmp_path):
    generator = torch.Generator().manual_seed(0)
    info = {"key": "é", "timing_stats": {"batch_size": 2}}
    for codes in (torch.zeros(1, 1), torch.randint(0, 1024, (30, 20), generator=generator)):
        save_tokens(str(tmp_path / "tokens.json"), codes.long(), info)
        expected = json.dumps({"quantized_tokens": codes.long().tolist(), "info": info}, ensure_ascii=False, indent=4)
        assert (tmp_path / "tokens.json").read_text(encoding="utf-8") == expected


def test_bad_clips_are_named_and_the_others_finished(tmp_path, tiny_checkpoint, tiny_model, lines, capfd):
    Path(lines[2]["wav"]).write_text("no audio")
    lines[4]["wav"] = str(tmp_path / "nowhere.wav")
    listed = [*lines, "no json", {"key": "keyless"}]
    assert main(arguments(tmp_path, tiny_checkpoint, listed, "wav2token")) == 1
    output = capfd.readouterr()
    for culprit in ("clip2: ", "nowhere.wav", "line 8: ", "line 9: wav is missing"):
        assert culprit in output.err
    assert "wav2token: 5 of 9 clips" in output.out
    check([line for line in lines if line["key"] not in ("clip2", "clip4")], tiny_model, tokens=True, audio=False)


def test_bad_codes_are_named_and_the_others_decoded(tmp_path, tiny_checkpoint, tiny_model, lines, capfd):
    assert main(arguments(tmp_path, tiny_checkpoint, lines, "wav2token")) == 0
    for index, tokens in ((1, [[5000] * 20]), (3, [[0] * 21]), (6, [[10**30]])):
        Path(lines[index]["quantized_tokens"]).write_text(json.dumps({"quantized_tokens": tokens}))
    assert main(arguments(tmp_path, tiny_checkpoint, lines, "token2wav")) == 1
    output = capfd.readouterr()
    for culprit in ("clip1: ", "clip3: ", "clip6: "):
        assert f"failed: {culprit}" in output.err
    assert "token2wav: 4 of 7 clips" in output.out
    check([lines[index] for index in (0, 2, 4, 5)], tiny_model, tokens=True, audio=True)


def test_a_clip_that_fails_does_not_take_its_batch_along(
    tmp_path, tiny_checkpoint, tiny_model, lines, capfd, monkeypatch
):
    def encode(model, samples, lengths, num_quantizers):
        if 1000 + 777 in lengths:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode_packed(model, samples, lengths, num_quantizers)

    monkeypatch.setattr("mimo_audio_hf.inference.encode_packed", encode)
    assert main(arguments(tmp_path, tiny_checkpoint, lines, "wav2token")) == 1
    output = capfd.readouterr()
    assert "failed: clip1: CUDA out of memory" in output.err
    assert "wav2token: 6 of 7 clips" in output.out
    check([line for line in lines if line["key"] != "clip1"], tiny_model, tokens=True, audio=False)


def test_other_processes_write_as_threads_do(tmp_path, tiny_checkpoint, tiny_model, lines, capfd, monkeypatch):
    """They do where a GPU runs the model."""
    monkeypatch.setattr(offline, "_writers", lambda has_gpu: worker_pool(2))
    Path(lines[2]["wav"]).write_text("no audio")
    Path(lines[5]["reconstructed_wav"]).mkdir(parents=True)
    assert main(arguments(tmp_path, tiny_checkpoint, lines, "wav2token2wav")) == 1
    output = capfd.readouterr()
    assert f"failed: clip5: [Errno 21] Is a directory: '{lines[5]['reconstructed_wav']}'" in output.err
    assert "wav2token2wav: 5 of 7 clips" in output.out
    done = [line for index, line in enumerate(lines) if index not in (2, 5)]
    check(done, tiny_model, tokens=True, audio=True)


def test_audio_that_is_too_loud_does_not_take_its_batch_along(tmp_path, tiny_checkpoint, tiny_model, lines, capfd):
    loud = np.random.default_rng(0).choice(np.float32([3.3e38, -3.3e38]), 44100)
    soundfile.write(lines[1]["wav"], loud, 44100, "FLOAT")
    assert main(arguments(tmp_path, tiny_checkpoint, lines, "wav2token")) == 1
    output = capfd.readouterr()
    assert "failed: clip1: " in output.err
    assert "too loud" in output.err
    assert "wav2token: 6 of 7 clips" in output.out
    check([line for line in lines if line["key"] != "clip1"], tiny_model, tokens=True, audio=False)


def test_whatever_keeps_a_clip_from_being_written_is_its_own_failure(
    tmp_path, tiny_checkpoint, tiny_model, lines, capfd, monkeypatch
):
    def save(path, codes, info):
        if info["key"] == "clip1":
            raise MemoryError
        save_tokens(path, codes, info)

    monkeypatch.setattr(offline, "save_tokens", save)
    assert main(arguments(tmp_path, tiny_checkpoint, lines, "wav2token")) == 1
    output = capfd.readouterr()
    assert "failed: clip1: MemoryError" in output.err
    assert "wav2token: 6 of 7 clips" in output.out


def test_writers_of_a_gpu_are_processes_and_share_its_cores(monkeypatch):
    asked = []
    monkeypatch.setattr(offline, "worker_pool", lambda *args: asked.append(args))
    for cores in (64, 6, 1):
        monkeypatch.setattr(offline, "available_cores", lambda cores=cores: cores)
        offline._writers(True)
    assert asked == [(8,), (3,), (1,)]


def test_shared_memory_that_does_not_suffice_is_named():
    """With torch's own words, seen where /dev/shm had 8 MB."""
    with pytest.raises(OSError, match="No space left on device.*accepted: more of it"), lost_processes_named():
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_a_writing_process_that_is_killed_ends_the_command(tmp_path, tiny_checkpoint, lines, capfd, monkeypatch):
    @contextmanager
    def killed(has_gpu):
        with worker_pool(1) as pool:
            pool.submit(signal.raise_signal, signal.SIGKILL)
            yield pool

    monkeypatch.setattr(offline, "_writers", killed)
    assert main(arguments(tmp_path, tiny_checkpoint, lines, "wav2token")) == 1
    assert "mimo_audio_tokenizer: error: a process was lost" in capfd.readouterr().err


def test_two_lines_may_not_write_one_file(tmp_path, tiny_checkpoint, lines, capfd):
    lines[3]["quantized_tokens"] = lines[1]["quantized_tokens"]
    assert main(arguments(tmp_path, tiny_checkpoint, lines, "wav2token")) == 1
    assert "lines 2 and 4 both write" in capfd.readouterr().err
    assert not Path(lines[0]["quantized_tokens"]).exists()


@pytest.mark.parametrize("content", ["[]", "{}", '{"quantized_tokens": [1, 2]}', '{"quantized_tokens": [[0.5]]}', "{"])
def test_bad_token_files(tmp_path, content):
    path = tmp_path / "tokens.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="tokens.json"):
        load_tokens(str(path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_token_file_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tokens.json")
    with pytest.raises(ValueError, match="tokens.json: no regular file; accepted: a token file"):
        load_tokens(str(tmp_path / "tokens.json"))


def test_a_source_is_never_overwritten(tmp_path, tiny_checkpoint, lines, capfd):
    lines[1]["reconstructed_wav"] = lines[2]["wav"]
    before = Path(lines[2]["wav"]).read_bytes()
    assert main(arguments(tmp_path, tiny_checkpoint, lines, "wav2token2wav")) == 1
    assert "is to be read and written" in capfd.readouterr().err
    assert Path(lines[2]["wav"]).read_bytes() == before


def test_one_file_under_two_spellings(tmp_path, tiny_checkpoint, lines, capfd):
    lines[3]["quantized_tokens"] = str(tmp_path / "out" / ".." / "out" / "1.json")
    assert main(arguments(tmp_path, tiny_checkpoint, lines, "wav2token")) == 1
    assert "lines 2 and 4 both write" in capfd.readouterr().err


def test_an_interruption_is_said_in_one_line(tmp_path, tiny_checkpoint, lines, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(offline, "encode_stream", interrupt)
    assert main(arguments(tmp_path, tiny_checkpoint, lines, "wav2token")) == 130
    assert capsys.readouterr().err == "mimo_audio_tokenizer: error: interrupted\n"
