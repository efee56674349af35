"""Recordings of every kind become what engines read and browsers play; what cannot is refused with a sentence."""

from __future__ import annotations

import importlib.util
import random
import re
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import phone_recordings
import pytest
import soundfile
from app_process import wait_until
from fakes import Gate, Worker

from residency.cancellation import Cancellation, cancelled_by
from residency.errors import InvalidInput, RequestStopped
from residency.web.speech import conversion, decode
from residency.web.speech.conversion import Conversion, Limits
from residency.web.speech.encoding import Encoder
from residency.web.speech.recordings import Recordings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recordings").mkdir()
    return tmp_path / "recordings"


@pytest.fixture
def receive(folder: Path) -> Conversion:
    return Conversion(Recordings(folder), Limits(audio_s=5.0))


def pitch_hz(path: str) -> float:
    samples, rate = soundfile.read(path)
    middle = samples[len(samples) // 4 : -len(samples) // 4]
    return float(np.abs(np.fft.rfft(middle)).argmax() * rate / len(middle))


@pytest.mark.parametrize("name", phone_recordings.FORMATS)
def test_what_phones_record_becomes_a_wav_file_with_the_same_sound(
    receive: Conversion, folder: Path, tmp_path: Path, name: str
) -> None:
    given = phone_recordings.record(tmp_path / name)
    readable = receive.readable(str(given))
    assert Path(readable).parent.parent == folder
    header = soundfile.info(readable)
    expected = ("WAV", "PCM_16", 1, phone_recordings.FORMATS[name][2])
    assert (header.format, header.subtype, header.channels, header.samplerate) == expected
    assert header.duration == pytest.approx(1.0, abs=0.1)
    assert pitch_hz(readable) == pytest.approx(phone_recordings.TONE_HZ, rel=0.05)
    assert [path for path in folder.rglob("*") if path.is_file()] == [Path(readable)]


@pytest.mark.parametrize("form", ["WAV", "FLAC", "MP3", "OGG"])
def test_what_browsers_play_stays_as_it_is(receive: Conversion, folder: Path, tmp_path: Path, form: str) -> None:
    soundfile.write(tmp_path / "given", np.zeros(8000), 8000, format=form)
    assert receive.readable(str(tmp_path / "given")) == str(tmp_path / "given")
    assert not any(folder.iterdir())


def test_a_recording_is_converted_once(receive: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = str(phone_recordings.record(tmp_path / "iphone.m4a"))
    first = receive.readable(given)
    monkeypatch.setattr(conversion.subprocess, "Popen", None)
    assert receive.readable(given) == first
    assert receive.readable(first) == first


class TestSeveralAtATime:
    @pytest.fixture
    def gate(self, receive: Conversion, monkeypatch: pytest.MonkeyPatch) -> Gate:
        """Recordings that are called slow are decoded once it is open."""
        gate, decoded = Gate(), receive._decode

        def decode(source: str, target: str, most_samples: float) -> None:
            self.decodes += 1
            if "slow" in source:
                gate.pass_through()
            decoded(source, target, most_samples)

        self.decodes = 0
        monkeypatch.setattr(receive, "_decode", decode)
        return gate

    def test_one_that_takes_long_does_not_stop_another(self, receive: Conversion, gate: Gate, tmp_path: Path) -> None:
        slow = Worker(receive.readable, str(phone_recordings.record(tmp_path / "slow.m4a", "iphone.m4a")))
        gate.wait_for_arrival()
        assert Path(receive.readable(str(phone_recordings.record(tmp_path / "iphone.m4a")))).exists()
        gate.open()
        slow.result()

    def test_one_that_is_asked_for_twice_is_converted_once(
        self, receive: Conversion, gate: Gate, tmp_path: Path
    ) -> None:
        given = str(phone_recordings.record(tmp_path / "slow.m4a", "iphone.m4a"))
        first = Worker(receive.readable, given)
        gate.wait_for_arrival()
        second = Worker(receive.readable, given)
        gate.open()
        assert first.result() == second.result()
        assert self.decodes == 1

    def test_a_cancelled_one_leaves_the_others_that_wait(
        self, receive: Conversion, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(conversion, "_AT_A_TIME", 1)
        running = Worker(receive.readable, str(phone_recordings.record(tmp_path / "slow.m4a", "iphone.m4a")))
        gate.wait_for_arrival()
        cancellation = Cancellation()

        def ask() -> str:
            with cancelled_by(cancellation):
                return receive.readable(given)

        given = str(phone_recordings.record(tmp_path / "iphone.m4a"))
        waits = Worker(ask)
        assert wait_until(lambda: bool(receive._converting) and len(receive._converting) == 2)
        cancellation.cancel()
        with pytest.raises(RequestStopped):
            waits.result()
        gate.open()
        running.result()
        assert self.decodes == 1
        assert Path(receive.readable(given)).exists(), "its place is free"

    def test_the_decoder_of_a_cancelled_one_is_ended(
        self, receive: Conversion, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stalls = tmp_path / "stalls.py"
        stalls.write_text(f"open({str(tmp_path / 'begun')!r}, 'w').close(); import time; time.sleep(600)")
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\nexec {sys.executable} {stalls}\n")
        program.chmod(0o755)
        monkeypatch.setattr(conversion.sys, "executable", str(program))
        cancellation = Cancellation()

        def ask() -> str:
            with cancelled_by(cancellation):
                return receive.readable(str(phone_recordings.record(tmp_path / "iphone.m4a")))

        stalled = Worker(ask)
        assert wait_until((tmp_path / "begun").exists)
        cancellation.cancel()
        with pytest.raises(RequestStopped):
            stalled.result()
        assert list(folder.iterdir()) == []


def test_the_name_tells_nothing(receive: Conversion, tmp_path: Path) -> None:
    disguised = phone_recordings.record(tmp_path / "-i https:evil.wav", "iphone.m4a")
    assert soundfile.info(receive.readable(str(disguised))).samplerate == 44100
    soundfile.write(tmp_path / "true.wav", np.zeros(8000), 8000)
    (tmp_path / "true.wav").rename(tmp_path / "memo.m4a")
    assert receive.readable(str(tmp_path / "memo.m4a")) == str(tmp_path / "memo.m4a")


class TestLimits:
    def test_a_long_recording_is_decoded_up_to_the_limit_only(
        self, receive: Conversion, folder: Path, tmp_path: Path
    ) -> None:
        long = phone_recordings.record(tmp_path / "old.3gp", seconds=60)
        with pytest.raises(InvalidInput, match=r"longer than 5 s.*--max-audio.*超过 5 秒"):
            receive.readable(str(long))
        assert not any(folder.iterdir()), "nothing of it is left"
        with pytest.raises(decode.Refused):
            decode.decode(str(long), str(tmp_path / "part.wav"), most_s=5.0, most_samples=1e9)
        assert soundfile.info(str(tmp_path / "part.wav")).duration <= 5.0

    def test_one_of_many_channels_is_refused_however_short(self, tmp_path: Path, folder: Path) -> None:
        many = phone_recordings.record(tmp_path / "many.mp4", "camera.mp4", seconds=1.9, layout="7.1")
        with pytest.raises(InvalidInput, match=r"more samples than 2 s.*mono.*采样数"):
            Conversion(Recordings(folder), Limits(audio_s=2.0)).readable(str(many))

    def test_without_a_limit_all_is_decoded(self, folder: Path, tmp_path: Path) -> None:
        given = phone_recordings.record(tmp_path / "old.amr", seconds=10)
        readable = Conversion(Recordings(folder), Limits(audio_s=float("inf"))).readable(str(given))
        assert soundfile.info(readable).duration == pytest.approx(10, abs=0.1)


class TestUnreadable:
    @pytest.fixture
    def refused(self, receive: Conversion, folder: Path, tmp_path: Path) -> Any:
        def refused(content: bytes, reason: str = ".+") -> None:
            (tmp_path / "memo.m4a").write_bytes(content)
            with pytest.raises(InvalidInput, match=rf"cannot be read \({reason}\).*无法读取该录音"):
                receive.readable(str(tmp_path / "memo.m4a"))
            assert not any(folder.iterdir()), "nothing of it is left"

        return refused

    @pytest.mark.parametrize("content", [b"", b"no sound at all\n" * 100, b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(999)])
    def test_what_is_no_recording(self, refused: Any, content: bytes) -> None:
        refused(content)

    def test_the_reason_is_said_in_both_languages_and_not_in_the_words_of_ffmpeg(
        self, receive: Conversion, tmp_path: Path
    ) -> None:
        webm, sound = phone_recordings.record(tmp_path / "browser.webm").read_bytes(), tmp_path / "memo.m4a"
        for content in (b"no sound at all\n" * 100, b"OggS" + bytes(100), webm[:60], bytes(3000)):
            sound.write_bytes(content)
            with pytest.raises(InvalidInput) as raised:
                receive.readable(str(sound))
            assert re.search(r"\(it [a-z ,]+\): record it again", raised.value.en)
            assert re.search(r"（[^A-Za-z]+）：请重新录制", raised.value.zh)

    def test_a_recording_that_lacks_its_end(self, refused: Any, tmp_path: Path) -> None:
        whole = phone_recordings.record(tmp_path / "iphone.m4a").read_bytes()
        refused(whole[: len(whole) // 2])

    def test_files_that_name_other_files_or_addresses(self, refused: Any, tmp_path: Path) -> None:
        other = phone_recordings.record(tmp_path / "old.3gp")
        refused(f"ffconcat version 1.0\nfile {other}\n".encode())
        refused(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other.as_uri()}\n#EXT-X-ENDLIST\n".encode())
        refused(b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 9 RTP/AVP 0\n")

    def test_a_picture_without_sound(self, refused: Any, tmp_path: Path) -> None:
        import av

        with av.open(str(tmp_path / "silent.mp4"), "w") as file:
            track = file.add_stream("mpeg4", rate=10)
            track.width = track.height = 64
            file.mux(track.encode(av.VideoFrame(64, 64, "yuv420p")))
            file.mux(track.encode(None))
        refused((tmp_path / "silent.mp4").read_bytes())

    def test_a_decoder_that_others_have_killed(
        self, receive: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As the system does when main memory is full. The recording is not to blame."""
        (tmp_path / "killed.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(conversion, "decode", SimpleNamespace(**{**vars(decode), "__name__": "killed"}))
        with pytest.raises(InvalidInput, match=r"stopped on the server: try again.*请重试"):
            receive.readable(str(phone_recordings.record(tmp_path / "iphone.m4a")))

    @pytest.mark.parametrize(
        ("death", "reason"),
        [
            ("os.kill(os.getpid(), signal.SIGSEGV)", "the decoder failed on it"),
            ("[0 for _ in iter(int, 1)]", "the decoder failed on it"),
            ("bytearray(2 << 30)", "reading it needs too much memory"),
            ("signal.pause()", "reading it takes too long"),
        ],
    )
    def test_a_decoder_that_crashes_or_never_ends(
        self, refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: str, reason: str
    ) -> None:
        (tmp_path / "doomed.py").write_text(
            "import os, signal, sys\nfrom residency.web.speech import decode\n"
            f"sys.argv[-1] = '--cpu=1'\ndecode.decode = lambda *given: {death}\ndecode.main()\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(conversion, "decode", SimpleNamespace(**{**vars(decode), "__name__": "doomed"}))
        if "pause" in death:
            monkeypatch.setattr(conversion, "_LONGEST_S", 1.0)
        refused(b"anything", reason)

    def test_a_failure_of_the_decoder_itself_is_said_and_logged(
        self, receive: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "broken.py").write_text("import no_such_module\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(conversion, "decode", SimpleNamespace(**{**vars(decode), "__name__": "broken"}))
        with pytest.raises(InvalidInput, match=r"could not convert.*no_such_module.*upload WAV"):
            receive.readable(str(phone_recordings.record(tmp_path / "iphone.m4a")))
        assert "Traceback" in caplog.text

    @pytest.mark.parametrize("name", ["iphone.m4a", "browser.webm", "old.3gp"])
    def test_damaged_ones_are_read_or_refused_and_nothing_else(
        self, receive: Conversion, folder: Path, tmp_path: Path, name: str
    ) -> None:
        whole = phone_recordings.record(tmp_path / name).read_bytes()
        chance = random.Random(name)
        for number in range(8):
            damaged = bytearray(whole if number % 2 else whole[: chance.randrange(len(whole))])
            for _ in range(chance.randrange(20)):
                damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            given = tmp_path / f"{number}-{name}"
            given.write_bytes(damaged)
            with suppress(InvalidInput):
                assert soundfile.info(receive.readable(str(given))).duration <= 5.0
        assert not list(folder.glob("converting-*"))


class TestWithoutPyAV:
    @pytest.fixture(autouse=True)
    def without_av(self, monkeypatch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else find(name))

    def test_the_message_names_what_to_install(self, receive: Conversion, tmp_path: Path) -> None:
        given = phone_recordings.record(tmp_path / "iphone.m4a")
        with pytest.raises(InvalidInput, match=r"pip install 'gpu-managed-tts\[app\]'.*请执行 pip install"):
            receive.readable(str(given))

    def test_what_engines_read_is_left_as_it_is(self, receive: Conversion, tmp_path: Path) -> None:
        given = str(phone_recordings.record(tmp_path / "studio.aiff"))
        assert receive.readable(given) == given


def test_flac_without_a_length_is_read_as_long_as_it_is(receive: Conversion, tmp_path: Path) -> None:
    """As this app streams it: libsndfile gives such a file 2^63 - 1 samples."""
    samples = 0.3 * np.sin(np.arange(48_000) / 10)
    with Encoder("flac", 24_000) as encoder:
        (tmp_path / "streamed.flac").write_bytes(encoder.encode(samples) + encoder.finish())
    assert soundfile.info(tmp_path / "streamed.flac").frames > 1 << 60
    read, sample_rate = soundfile.read(receive.readable(str(tmp_path / "streamed.flac")))
    assert (len(read), sample_rate) == (48_000, 24_000)
    assert np.abs(read - samples).max() < 1e-3
