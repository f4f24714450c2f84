"""The page of `mimo-audio demo` and the Space, without a browser and in one."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from packaging.requirements import Requirement

from mimo_audio_hf import (
    AudioCodes,
    MiMoAudioTokenizerFeatureExtractor,
    decode_codes,
    encode_waveforms,
    load_audio,
    load_model,
)
from mimo_audio_hf.cli import main
from mimo_audio_hf.pictures import reconstruction_figure


ROOT = Path(__file__).parent.parent
SPACE = ROOT / "hub_card" / "space"
SPEECH = ROOT / "tests" / "fixtures" / "audio" / "prompt_speech_en_m.wav"
CHROMIUM = shutil.which("chromium")
CHROMEDRIVER = shutil.which("chromedriver")

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")
needs_browser = pytest.mark.skipif(
    None in (CHROMIUM, CHROMEDRIVER) or importlib.util.find_spec("selenium") is None,
    reason="chromium, chromedriver or the package selenium is not installed",
)


@pytest.fixture(scope="module")
def model():
    return load_model("tiny", device="cpu")


# --- The picture ---


def test_picture_of_codes(model):
    waveform = load_audio(SPEECH)[:24000]
    (codes,) = encode_waveforms(model, [waveform])
    clip = AudioCodes.of_model(model.config, codes, num_samples=len(waveform))
    extractor = MiMoAudioTokenizerFeatureExtractor.from_config(model.config)
    figure = reconstruction_figure(waveform, waveform, extractor, clip, 3)
    image = figure.axes[4].images[0]
    sizes = torch.tensor(clip.codebook_sizes)
    assert torch.equal((torch.tensor(image.get_array()).t() * (sizes - 1)).round().long(), codes)
    opacity = torch.tensor(image.get_alpha())
    assert (opacity[:3] == 1).all() and (opacity[3:] < 0.5).all()
    assert image.get_extent()[1] == len(codes) / 25


# --- What the page does ---


@needs_gradio
def test_encode_and_reconstruct(model):
    from mimo_audio_hf.demo import Demo

    demo = Demo(model)
    clip = demo.encode(SPEECH)
    (expected,) = encode_waveforms(model, [load_audio(SPEECH)])
    assert torch.equal(clip.codes.codes, expected)
    results = {books: demo.reconstruct(clip, books) for books in (1, 8, 20)}
    for books, result in results.items():
        samples, rate = soundfile.read(result.audio, dtype="float32")
        (decoded,) = decode_codes(model, [expected[:, :books]])
        assert rate == 24000 and len(samples) == len(load_audio(SPEECH))
        assert (torch.tensor(samples) - decoded[: len(samples)].clamp(-1, 1)).abs().max() < 2**-15
        assert torch.equal(AudioCodes.load(result.codes).codes, expected[:, :books])
    assert "1.55 kbit/s" in results[8].summary and "110 frames" in results[8].summary
    with pytest.raises(ValueError, match="21"):
        demo.reconstruct(clip, 21)
    # A visitor's files go with the clip.
    folder = Path(clip.folder.name)
    del clip
    assert not folder.exists()


@needs_gradio
@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "nan", "long", "packed"])
def test_bad_files(model, tmp_path, kind):
    from mimo_audio_hf.demo import Demo

    path = tmp_path / "bad.wav"
    if kind == "text":
        path.write_text("no audio")
    elif kind == "truncated":
        path.write_bytes(SPEECH.read_bytes()[:5000])
    elif kind == "nan":
        soundfile.write(path, torch.full((100,), torch.nan).numpy(), 24000, subtype="FLOAT")
    elif kind == "long":
        soundfile.write(path, torch.zeros(24000 * 3).numpy(), 24000)
    elif kind == "packed":  # an hour of silence in a small file
        path = path.with_suffix(".flac")
        soundfile.write(path, torch.zeros(8000 * 3600, dtype=torch.int16).numpy(), 8000)
        assert path.stat().st_size < 1_000_000
    else:
        path.touch()
    with pytest.raises(ValueError, match="accepted") as error:
        Demo(model, max_seconds=2).encode(path)
    assert str(error.value).startswith(path.name)
    assert str(tmp_path) not in str(error.value)


@needs_gradio
@pytest.mark.parametrize("name", ["a" * 250, "ü" * 124])
def test_a_long_name_is_cut(model, tmp_path, name):
    from mimo_audio_hf.demo import Demo

    shutil.copy(SPEECH, tmp_path / f"{name}.wav")
    demo = Demo(model)
    clip = demo.encode(tmp_path / f"{name}.wav")
    result = demo.reconstruct(clip, 20)
    assert result.codes.is_file() and result.codes.name.startswith(name[:50])


@needs_gradio
def test_recordings_are_kept_for_an_hour_at_most(model):
    """As the Space's page says: files are looked for every so often, and deleted from an age on."""
    from mimo_audio_hf.demo import Demo, build_page

    page = build_page(Demo(model))
    assert sum(page.delete_cache) <= 3600
    assert "for an hour at most" in (SPACE / "README.md").read_text()


@needs_gradio
def test_encoder_only_is_refused(model):
    from mimo_audio_hf.demo import Demo

    encoder = load_model("tiny", device="cpu")
    encoder.decoder = None
    with pytest.raises(ValueError, match="tiny holds an encoder only; accepted"):
        Demo(encoder)


# --- The command and the Space ---


@needs_gradio
def test_command_names_a_missing_example(capsys, tmp_path):
    assert main(["demo", str(tmp_path / "none.wav"), "--model", "tiny", "--device", "cpu"]) == 1
    assert f"{tmp_path / 'none.wav'}: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "65536", "80000", "-1", "http"])
def test_command_names_a_bad_port(capsys, port):
    with pytest.raises(SystemExit) as ended:
        main(["demo", f"--port={port}"])
    assert ended.value.code == 2
    assert f"argument --port: '{port}'; accepted: 1 to 65535" in capsys.readouterr().err


@needs_gradio
def test_command_names_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert main(["demo", "--model", "tiny", "--device", "cpu", "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert f"--host 127.0.0.1 --port {port}: " in error and "accepted: an address of this machine" in error
    assert error.count("\n") == 1


@needs_gradio
@pytest.mark.parametrize("host", ["256.0.0.1", "[::g]", "a..b"])
def test_command_names_a_bad_host(capsys, host):
    assert main(["demo", "--model", "tiny", "--device", "cpu", "--host", host]) == 1
    assert f"--host {host.strip('[]')}: " in capsys.readouterr().err


def test_command_names_a_missing_package(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "mimo_audio_hf.demo", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "--model", "tiny"]) == 1
    assert "gradio is not installed; accepted: pip install 'mimo-audio-hf[demo]'" in capsys.readouterr().err


def test_metadata_of_the_space():
    metadata = yaml.safe_load((SPACE / "README.md").read_text().split("---\n")[1])
    assert (metadata["sdk"], metadata["license"]) == ("gradio", "apache-2.0")
    assert (SPACE / metadata["app_file"]).is_file()
    # The Hub refuses other colours and longer descriptions.
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {metadata["colorFrom"], metadata["colorTo"]} <= colours
    assert len(metadata["short_description"]) <= 60
    (bound,) = re.findall(r'^demo = \["(gradio[^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert Requirement(bound).specifier.contains(metadata["sdk_version"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", metadata["sdk_version"])
    assert (SPACE / "requirements.txt").read_text().split() == ["mimo-audio-hf[demo]"]
    assert len(load_audio(SPACE / "examples" / "speech.flac")) == len(load_audio(SPEECH))


# --- In a browser ---


@contextlib.contextmanager
def served(folder: Path, *command: str, cwd: Path) -> Iterator[str]:
    """Runs a Python program that serves a page; gives the page's address once it is there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder / "served"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "src"),
    }
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, *command], cwd=cwd, env=environment, stdout=output, stderr=output)
    address = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(address).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """Of the page that the command serves."""
    folder = tmp_path_factory.mktemp("demo")
    options = ["--model", "tiny", "--device", "cpu", "--max-seconds", "10"]
    with served(folder, "-m", "mimo_audio_hf.cli", "demo", *options, cwd=folder) as address:
        yield address


class Page:
    """What a visitor does and sees."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        self.driver.get(address)
        self.wait_for(lambda: self.driver.find_element("id", "message").text)

    def wait_for(self, condition: Callable[[], object]):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 60, ignored_exceptions=(Exception,)).until(lambda _: condition())

    @property
    def message(self) -> str:
        return self.driver.find_element("id", "message").text

    def upload(self, path: Path) -> None:
        self.driver.find_element("css selector", "#recording input[type=file]").send_keys(str(path))

    def click(self, selector: str) -> None:
        """Something of the recorder."""

        def click() -> bool:
            self.driver.find_element("css selector", f"#recording {selector}").click()
            return True

        self.wait_for(click)

    def clear(self) -> None:
        """As a visitor does who clicks again where a click was lost: while a page draws what came, some are."""

        def is_cleared() -> bool:
            if not self.message.startswith("Choose a file"):
                self.driver.find_element("css selector", "#recording button[aria-label=Clear]").click()
            return self.message.startswith("Choose a file")

        self.wait_for(is_cleared)

    def choose(self, codebooks: int) -> None:
        """Move the slider with the keyboard."""
        from selenium.webdriver.common.keys import Keys

        slider = self.driver.find_element("css selector", "#codebooks input[type=range]")
        move = codebooks - int(slider.get_attribute("value"))
        slider.send_keys((Keys.ARROW_RIGHT if move > 0 else Keys.ARROW_LEFT) * abs(move))

    def type_number(self, text: str) -> None:
        """Into the box beside the slider, in place of what is there."""
        from selenium.webdriver.common.keys import Keys

        box = self.driver.find_element("css selector", "#codebooks input[type=number]")
        box.send_keys(Keys.CONTROL, "a")  # which are released at the end of the call
        box.send_keys(Keys.BACKSPACE, text)

    def address_of_decoded(self) -> str | None:
        links = self.driver.find_elements("css selector", "#decoded a[href*='file=']")
        return links[0].get_attribute("href") if links else None

    def audio(self) -> torch.Tensor:
        with urllib.request.urlopen(self.address_of_decoded()) as answer:
            return load_audio(answer.read())

    def picture(self) -> str:
        return self.wait_for(lambda: self.driver.find_element("css selector", "#picture img").get_attribute("src"))

    def hosts(self) -> set[str]:
        """Whom the page asked for anything so far."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        requests = (event["params"] for event in events if event["method"] == "Network.requestWillBeSent")
        addresses = (urllib.parse.urlparse(request["request"]["url"]) for request in requests)
        return {address.netloc for address in addresses if address.scheme in ("http", "https", "ws", "wss")}


@pytest.fixture
def page(tmp_path) -> Iterator[Page]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "disable-dev-shm-usage",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "use-fake-device-for-media-stream",  # a microphone that beeps
        "use-fake-ui-for-media-stream",  # and a visitor who allows it
        "window-size=1280,1400",
        f"user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    yield Page(driver)
    if "MIMO_AUDIO_SCREENSHOTS" in os.environ:  # a folder: to look at
        driver.save_screenshot(Path(os.environ["MIMO_AUDIO_SCREENSHOTS"], f"{tmp_path.name}.png"))
    driver.quit()


def decoded_from(model, codebooks: int) -> torch.Tensor:
    (codes,) = encode_waveforms(model, [load_audio(SPEECH)], codebooks)
    return decode_codes(model, [codes])[0][: len(load_audio(SPEECH))].clamp(-1, 1)


def is_heard(heard: torch.Tensor, expected: torch.Tensor) -> bool:
    """The same but for what 16 bits and other numbers of threads round."""
    return heard.shape == expected.shape and bool((heard - expected).abs().max() < 1e-3)


@needs_gradio
@needs_browser
def test_page_in_a_browser(model, address, page, tmp_path):
    page.open(address)
    assert page.message.startswith("Choose a file") and page.address_of_decoded() is None

    page.upload(SPEECH)
    page.wait_for(lambda: "1.55 kbit/s" in page.message and page.address_of_decoded())
    eight, picture = page.audio(), page.picture()
    assert is_heard(eight, decoded_from(model, 8))
    assert picture.startswith("data:image/png;base64,")

    page.choose(1)
    page.wait_for(lambda: "0.25 kbit/s" in page.message and "-1-codebooks" in page.address_of_decoded())
    one = page.audio()
    assert is_heard(one, decoded_from(model, 1))
    assert not is_heard(one, eight)
    page.wait_for(lambda: page.picture() != picture)

    page.choose(20)
    page.wait_for(lambda: "3.65 kbit/s" in page.message and "-20-codebooks" in page.address_of_decoded())
    assert is_heard(page.audio(), decoded_from(model, 20))

    # The box for the number is empty while another is typed, which changes nothing; an error would be in the log.
    page.type_number("")
    time.sleep(1)
    assert "3.65 kbit/s" in page.message and "-20-codebooks" in page.address_of_decoded()
    page.type_number("1")
    page.wait_for(lambda: "0.25 kbit/s" in page.message and "-1-codebooks" in page.address_of_decoded())
    assert is_heard(page.audio(), one)
    page.choose(20)
    page.wait_for(lambda: "3.65 kbit/s" in page.message)

    # Bad files get a message; what was heard before goes, and a good file works again.
    notes = tmp_path / "notes.wav"
    notes.write_text("these are no samples")
    long = tmp_path / "long.wav"
    soundfile.write(long, torch.zeros(11 * 24000).numpy(), 24000)
    for path, reason in ((notes, "This did not work. notes.wav:"), (long, "11 s of audio; accepted: up to 10 s")):
        page.clear()
        page.upload(path)
        page.wait_for(lambda reason=reason: reason in page.message)
        assert page.address_of_decoded() is None
        assert str(tmp_path) not in page.message
    page.clear()
    page.upload(SPEECH)
    page.wait_for(lambda: "3.65 kbit/s" in page.message and page.address_of_decoded())

    assert page.hosts() == {urllib.parse.urlparse(address).netloc}


@needs_gradio
@needs_browser
def test_recording_in_a_browser(address, page):
    page.open(address)
    page.click("button[aria-label='Record audio']")
    page.click("button.record-button")
    time.sleep(1)
    page.click("button.stop-button")
    page.wait_for(lambda: "1.55 kbit/s" in page.message and page.address_of_decoded())
    assert 0.5 < len(page.audio()) / 24000 < 10


@needs_gradio
@needs_browser
def test_space_in_a_browser(model, page, tmp_path):
    """It opens with its example, decoded."""
    with served(tmp_path, "app.py", cwd=SPACE) as address:
        page.open(address)
        page.wait_for(lambda: "1.55 kbit/s" in page.message and page.address_of_decoded())
        assert is_heard(page.audio(), decoded_from(model, 8))
        assert page.hosts() == {urllib.parse.urlparse(address).netloc}
