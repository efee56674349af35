from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from reverse_proxies import make_certificate

import app
from gpu_manager import GPUResourceManager, SimulatedDevice
from residency.engines.generations import GENERATIONS
from residency.engines.step_audio_facts import ACOUSTIC_MODEL
from residency.errors import InvalidInput
from residency.launch.settings import ENGINE_FLAGS, parse
from residency.launch.values import SimulatedCard, simulated_card, size_bytes


def test_without_flags_everything_is_as_in_the_public_app_and_management_is_off() -> None:
    settings = parse([], {})
    assert (settings.server_name, settings.server_port, settings.tmp_dir) == ("0.0.0.0", 7860, "/tmp/gradio")
    assert (settings.model_source, settings.torch_dtype, settings.device_map) == ("auto", "bfloat16", "cuda")
    assert settings.tokenizer_model_id.startswith("dengcunqin/speech_paraformer-large_asr_nat-zh-cantonese-en-16k")
    assert settings.model_path is settings.tts_model_id is settings.quantization is None
    assert settings.share is settings.enable_auto_transcribe is settings.enable_gpu_management is False
    assert (settings.engine, settings.gpu_keep_warm, settings.gpu_idle_timeout) == ("builtin", 0, 600)


def test_the_engines_flags_are_those_of_both_public_apps() -> None:
    flags = {name: default for generation in GENERATIONS for name, default in generation.flags.items()}
    settings = parse([], {})
    assert {name: getattr(settings, name) for name in flags} == flags
    assert set(ENGINE_FLAGS) == {*flags, "quantization"}
    for generation in GENERATIONS:
        for quantization in generation.quantizations:
            assert parse(["--quantization", quantization], {}).engine_flags() == {"quantization": quantization}


def test_only_given_flags_are_passed_to_the_engine(tmp_path: Path) -> None:
    assert parse([], {}).engine_flags() == {}
    assert parse(["--torch-dtype", "bfloat16"], {}).engine_flags() == {"torch_dtype": "bfloat16"}, "also a default"
    given = (
        "--tokenizer-path ~/t --tensor-parallel-size 2 --gpu-memory-utilization 0.25 --max-model-len 4096 "
        "--dtype float16 --enforce-eager --kv-cache-dtype fp8_e5m2 --max-num-seqs 4 --max-num-batched-tokens 8 "
        "--cosyvoice-dtype bfloat16 --no-cosyvoice-cuda-graph"
    )
    settings = parse(given.split(), {})
    assert settings.engine_flags() == {
        "tokenizer_path": os.path.expanduser("~/t"), "tensor_parallel_size": 2, "gpu_memory_utilization": 0.25,
        "max_model_len": 4096, "dtype": "float16", "enforce_eager": True, "kv_cache_dtype": "fp8_e5m2",
        "max_num_seqs": 4, "max_num_batched_tokens": 8, "cosyvoice_dtype": "bfloat16", "cosyvoice_cuda_graph": False,
    }  # fmt: skip
    assert settings.torch_dtype == "bfloat16"
    assert parse(["--cosyvoice-cuda-graph"], {}).engine_flags() == {"cosyvoice_cuda_graph": True}


def test_times_are_read_with_units_and_minus_one_is_never() -> None:
    settings = parse(["--gpu-idle-timeout", "15m", "--gpu-keep-warm", "-1"], {})
    assert (settings.gpu_idle_timeout, settings.gpu_keep_warm) == (900, math.inf)


def test_budget_load_timeout_and_grace() -> None:
    settings = parse([], {})
    assert (settings.gpu_budget, settings.gpu_load_timeout, settings.shutdown_grace) == (None, math.inf, 10)
    settings = parse(["--gpu-budget", "24GB", "--gpu-load-timeout", "5m", "--shutdown-grace", "0"], {})
    assert (settings.gpu_budget, settings.gpu_load_timeout, settings.shutdown_grace) == (24 << 30, 300, 0)
    assert parse(["--shutdown-grace", "-1"], {}).shutdown_grace == math.inf


def test_a_request_waits_ten_minutes_at_most_unless_told_otherwise() -> None:
    assert parse([], {}).gpu_wait_timeout == 600
    assert parse(["--gpu-wait-timeout", "90s"], {}).gpu_wait_timeout == 90
    assert parse(["--gpu-wait-timeout", "-1"], {}).gpu_wait_timeout == math.inf


def test_models_share_the_process_of_the_app_unless_told_otherwise() -> None:
    settings = parse([], {})
    assert (settings.gpu_isolation, settings.gpu_residue) == ("none", "auto")
    settings = parse(["--enable-gpu-management", "--gpu-isolation", "process", "--gpu-residue", "keep"], {})
    assert (settings.gpu_isolation, settings.gpu_residue) == ("process", "keep")


def test_the_app_builds_its_manager_with_the_isolation_of_the_flags(tmp_path: Path) -> None:
    flags = ["--enable-gpu-management", "--simulate-gpu", "48GB", "--gpu-isolation", "process", "--gpu-residue", "keep"]
    with app.make_manager(parse(flags, {})) as manager:
        assert (manager.settings["isolation"], manager.settings["residue"]) == ("process", "keep")
    with pytest.raises(InvalidInput, match="leave out --gpu-snapshot-dir"):
        app.make_manager(parse([*flags, "--gpu-snapshot-dir", str(tmp_path)], {}))


def test_a_system_without_fork_servers_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(InvalidInput, match="use --gpu-isolation none"):
        GPUResourceManager(SimulatedDevice(1000), isolation="process")


@pytest.mark.parametrize(
    "wrong", [{"isolation": "thread"}, {"residue": "drop"}, {"isolation": "process", "residue": ""}]
)
def test_the_library_says_what_isolation_and_residue_can_be(wrong: dict[str, Any]) -> None:
    name = list(wrong)[-1]
    with pytest.raises(InvalidInput, match=f"{name} is (none or process|keep, checkpoint or auto), not"):
        GPUResourceManager(SimulatedDevice(1000), **wrong)


def test_keep_warm_may_be_left_to_learn() -> None:
    assert parse(["--gpu-keep-warm", "auto"], {}).gpu_keep_warm == "auto"


@pytest.mark.parametrize(
    ("text", "nbytes"), [("48GB", 48 << 30), ("48GiB", 48 << 30), ("512MB", 512 << 20), ("1.5g", 3 << 29)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert size_bytes(text) == nbytes


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("48GB", SimulatedCard(48 << 30)),
        ("48GB,context=400MB", SimulatedCard(48 << 30, 400 << 20)),
        ("1g, context = 1m", SimulatedCard(1 << 30, 1 << 20)),
        ("1g,shared=desk.1, context=1m", SimulatedCard(1 << 30, 1 << 20, "desk.1")),
    ],
)
def test_a_simulated_gpu_has_a_size_that_of_its_contexts_and_a_name(text: str, card: SimulatedCard) -> None:
    assert parse(["--enable-gpu-management", "--simulate-gpu", text], {}).simulate_gpu == card


@pytest.mark.parametrize("text", ["1g,shared", "1g,shared=", "1g,shared=../x", "1g,share=x", "1g,shared=a,shared=b"])
def test_a_simulated_gpu_with_a_wrong_name_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="simulated GPU"):
        simulated_card(text)


def test_an_engine_follows_the_model_path(tmp_path: Path) -> None:
    assert parse(["--model-path", str(tmp_path)], {}).engine == "step-audio"
    assert parse(["--model-path", str(tmp_path), "--engine", "builtin"], {}).engine == "builtin"
    assert parse(["--model-path", "stepfun-ai", "--model-source", "huggingface"], {}).engine == "step-audio"
    for model_path in ("stepfun-ai", "stepfun-ai/Step-Audio-EditX"):
        assert parse(["--model-path", model_path], {}).model_path == model_path, "auto looks for it on a hub"


def test_a_home_folder_that_the_shell_has_left_as_it_is_is_meant_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    paths = ["model_path", "asr_model", "step_audio_root", "tts_model_id", "tokenizer_model_id", "tmp_dir",
             "tokenizer_path", "gpu_snapshot_dir"]  # fmt: skip
    flags = [f"--{name.replace('_', '-')}=~/m" for name in paths]
    settings = parse(["--enable-auto-transcribe", *flags], {})
    assert {getattr(settings, name) for name in paths} == {str(tmp_path / "m")}
    assert parse([], {"STEP_AUDIO_ROOT": "~/m"}).step_audio_root == str(tmp_path / "m")


def test_the_acoustic_model_is_the_one_that_weights_are_checked_for() -> None:
    assert parse([], {}).tokenizer_model_id == ACOUSTIC_MODEL


def test_the_environment_is_a_default_and_a_flag_wins() -> None:
    environ = {"STEP_AUDIO_ROOT": "/a", "GPU_CONTROL_TOKEN": "secret"}
    assert parse([], environ).step_audio_root == "/a"
    assert parse([], environ).control_token == "secret"
    assert parse(["--step-audio-root", "/b"], environ).step_audio_root == "/b"
    assert parse([], {"GPU_CONTROL_TOKEN": ""}).control_token is None


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("[::1]", "::1"),
        ("::", "::"),
        ("[::]", "::"),
        ("localhost", "localhost"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("my-box_2.example.org", "my-box_2.example.org"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("[::ffff:0.0.0.0]", "0.0.0.0"),
    ],
)
def test_an_address_may_be_written_as_in_links(text: str, address: str) -> None:
    assert parse(["--server-name", text], {}).server_name == address


@pytest.mark.parametrize("text", ["", "*", "0", "127.1", "0x7f000001", "[::1", "1.2.3.4.5", "a b", "http://me"])
def test_what_is_no_address_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--server-name", text], {})
    said = capsys.readouterr().err
    assert "give 0.0.0.0 for all" in said
    assert "请写" in said


def test_allowed_hosts_add_up_and_win_over_the_environment() -> None:
    environ = {"GPU_TTS_ALLOWED_HOSTS": "A.example, https://b.example:8443/tts,,bücher.example."}
    assert parse([], {}).allowed_hosts == ()
    assert parse([], environ).allowed_hosts == ("a.example", "b.example", "xn--bcher-kva.example")
    flags = ["--allowed-host", "c.example,d.example", "--allowed-host=e.example"]
    assert parse(flags, environ).allowed_hosts == ("c.example", "d.example", "e.example")


def test_what_the_page_asks_for_and_takes() -> None:
    settings = parse(["--auth", "me:se:cret", "--max-upload", "5MB", "--max-audio", "2m", "--max-text", "10"], {})
    assert (settings.auth, settings.max_upload, settings.max_audio) == (("me", "se:cret"), 5 << 20, 120)
    assert settings.max_text == 10
    assert "cret" not in str(settings)
    assert parse([], {"GRADIO_AUTH": "me:secret"}).auth == ("me", "secret")
    assert parse([], {"GRADIO_AUTH": ""}).auth is None


@pytest.mark.parametrize("arguments", [["--auth", "me"], ["--auth", "me:"], ["--auth", ":me"], ["--max-text", "0"]])
def test_what_the_page_cannot_ask_for_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments, {})


def test_the_token_is_not_shown_with_the_settings() -> None:
    assert "secret" not in repr(parse(["--control-token", "secret"], {}))


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--model-path", "/no/such/place"], "/no/such/place"),
        (["--model-path", "no-such-place", "--model-source", "local"], "leave --model-path out"),
        (["--model-path", "no/such/place"], "no/such/place"),
        (["--model-path", "/models", "--model-source", "huggingface"], "leave --model-source out"),
        (["--engine", "step-audio"], "--model-path"),
        (["--simulate-gpu", "48GB"], "--enable-gpu-management"),
        (["--enable-gpu-management", "--simulate-gpu", "plenty"], "48GB"),
        (["--enable-gpu-management", "--simulate-gpu", "0GB"], "48GB"),
        (["--enable-gpu-management", "--simulate-gpu", "48GB,400MB"], "48GB,context=400MB"),
        (["--enable-gpu-management", "--simulate-gpu", "48GB,"], "48GB,context=400MB"),
        (["--enable-gpu-management", "--simulate-gpu", "48GB,contexts=400MB"], "48GB,context=400MB"),
        (["--enable-gpu-management", "--simulate-gpu", "48GB,context="], "'' is not a valid size"),
        (["--enable-gpu-management", "--simulate-gpu", "48GB,context=much"], "'much' is not a valid size"),
        (["--enable-gpu-management", "--simulate-gpu", "1GB,context=1GB"], "does not fit on a simulated GPU of 1 GB"),
        (["--gpu-idle-timeout", "soon"], "15m"),
        (["--gpu-keep-warm", "automatic"], "90s"),
        (["--gpu-keep-warm", "-5"], "-1"),
        (["--gpu-budget", "half"], "48GB"),
        (["--gpu-load-timeout", "soon"], "15m"),
        (["--shutdown-grace", "-2"], "-1"),
        (["--gpu-isolation", "process"], "--enable-gpu-management"),
        (["--enable-gpu-management", "--gpu-isolation", "container"], "process"),
        (["--enable-gpu-management", "--gpu-residue", "drop"], "checkpoint"),
        (["--server-port", "70000"], "65535"),
        (["--allowed-host", "speech example"], "speech.example.org"),
        (["--allowed-host", "http://[::1"], "speech.example.org"),
        (["--allowed-host", "*"], "speech.example.org"),
        (["--quantization", "int2"], "int4"),
        (["--quantization", "int2"], "fp8"),
        (["--gpu-memory-utilization", "0"], "such as 0.5"),
        (["--gpu-memory-utilization", "1.01"], "such as 0.5"),
        (["--gpu-memory-utilization", "nan"], "such as 0.5"),
        (["--gpu-memory-utilization", "half"], "such as 0.5"),
        (["--tensor-parallel-size", "0"], "1 or more"),
        (["--max-model-len", "-1"], "1 or more"),
        (["--max-num-seqs", "1.5"], "1 or more"),
        (["--max-num-batched-tokens", "0"], "1 or more"),
        (["--dtype", "float32"], "bfloat16"),
        (["--kv-cache-dtype", "int8"], "fp8_e4m3"),
        (["--cosyvoice-dtype", "int8"], "float16"),
        (["--model-path", "/no/such/place"], "of 2026"),
    ],
)
def test_what_is_wrong_is_refused_with_what_to_do_next(
    flags: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(flags, {})
    assert exit_.value.code == 2
    assert hint in capsys.readouterr().err


LONG = "0123456789abcdef"


def test_api_keys_add_up_and_win_over_the_environment() -> None:
    environ = {"GPU_TTS_API_KEYS": f"{LONG}, {LONG}x,"}
    assert parse([], environ).api_keys == (LONG, f"{LONG}x")
    assert parse([], {"GPU_TTS_API_KEYS": ""}).api_keys == (), "as compose.yaml passes it"
    assert parse(["--api-key", f"{LONG}y", "--api-key", f"{LONG}z"], environ).api_keys == (f"{LONG}y", f"{LONG}z")


@pytest.mark.parametrize("by", ["flag", "environment"])
@pytest.mark.parametrize("keys", ["", " ", ",", "s3cret", LONG[:15], f"{LONG},s3cret", f"  {LONG[:13]}  "])
def test_keys_that_can_be_guessed_are_refused_and_not_shown(
    capsys: pytest.CaptureFixture[str], keys: str, by: str
) -> None:
    if by == "environment" and not keys:
        return  # not set
    with pytest.raises(SystemExit):
        parse(*(([f"--api-key={keys}"], {}) if by == "flag" else ([], {"GPU_TTS_API_KEYS": keys})))
    said = capsys.readouterr().err
    assert "at least 16 characters" in said
    assert "s3cret" not in said


def test_a_name_from_the_environment_that_is_none_is_refused_with_its_source(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse([], {"GPU_TTS_ALLOWED_HOSTS": "a b"})
    assert "GPU_TTS_ALLOWED_HOSTS: 'a b'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--gpu-snapshot-dir", ""], ["--gpu-budget", "9" * 400 + "GB"]])
def test_what_an_unset_variable_or_a_stuck_key_makes_of_a_flag_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)


def test_a_recognizer_of_ones_own_needs_transcription_and_must_be_there(tmp_path: Path) -> None:
    on = "--enable-auto-transcribe"
    assert parse([on, "--asr-model", "openai/whisper-small"]).asr_model == "openai/whisper-small"
    assert parse([on, "--asr-model", str(tmp_path)]).asr_model == str(tmp_path)
    assert parse([on]).asr_model is None
    for arguments in (["--asr-model", "openai/whisper-small"], [on, "--asr-model", str(tmp_path / "none")]):
        with pytest.raises(SystemExit):
            parse(arguments)


@pytest.mark.parametrize("token", ["tökén", "秘密", "sec\nret", "sec\x00ret"])
@pytest.mark.parametrize("by", ["flag", "environment"])
def test_a_token_that_nobody_could_send_is_refused_and_not_shown(
    capsys: pytest.CaptureFixture[str], token: str, by: str
) -> None:
    with pytest.raises(SystemExit):
        parse(*(([f"--control-token={token}"], {}) if by == "flag" else ([], {"GPU_CONTROL_TOKEN": token})))
    said = capsys.readouterr().err
    assert "--control-token" in said
    assert token not in said


def test_a_token_from_a_file_may_end_in_a_new_line() -> None:
    assert parse([], {"GPU_CONTROL_TOKEN": "secret\n"}).control_token == "secret"


@pytest.mark.parametrize(
    ("given", "root_path"),
    [("/tts", "/tts"), ("/tts/", "/tts"), ("/gpu/tts", "/gpu/tts"), ("/", ""), ("", ""),
     ("https://tts.example:8443/a/b/", "https://tts.example:8443/a/b"), ("http://[::1]:80", "http://[::1]:80")],
)  # fmt: skip
def test_a_root_path_is_a_path_or_a_whole_address(given: str, root_path: str) -> None:
    assert parse(["--root-path", given], {}).root_path == root_path
    assert parse([], {"GPU_TTS_ROOT_PATH": given, "GRADIO_ROOT_PATH": ""}).root_path == root_path


def test_gradios_own_variable_is_a_default_of_a_default() -> None:
    environ = {"GRADIO_ROOT_PATH": "/old"}
    assert parse([], environ).root_path == "/old"
    assert parse([], {**environ, "GPU_TTS_ROOT_PATH": "/new"}).root_path == "/new"


@pytest.mark.parametrize(
    ("given", "hint"),
    [("tts", "write /tts"), ("/a//b", "write /tts"), ("/a/../b", "write /tts"), ("/a?b", "write /tts"),
     ("https://h:99999/x", "write /tts"), ("https://h:0", "write /tts"),
     ("ftp://a/b", "write /tts"), ("https:///a", "write /tts"), ("/<b>", "write /tts"), ("/gpu/", "choose another")],
)  # fmt: skip
def test_what_is_no_root_path_is_refused(given: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--root-path", given], {})
    said = capsys.readouterr().err
    assert hint in said
    assert "请" in said


def test_a_certificate_and_its_key_are_looked_at_before_anything_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate, key = make_certificate(tmp_path / "one", "localhost")
    _, another = make_certificate(tmp_path / "two", "localhost")
    flags = ["--ssl-certfile", certificate, "--ssl-keyfile", key]
    settings = parse(flags, {})
    assert (settings.ssl_certfile, settings.ssl_keyfile) == (certificate, key)

    (garbage := tmp_path / "garbage").write_text("no PEM")
    locked = tmp_path / "locked"
    encrypted = serialization.BestAvailableEncryption(b"password")
    made = serialization.load_pem_private_key(Path(key).read_bytes(), None)
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked.write_bytes(made.private_bytes(*form, encrypted))
    for wrong, hint in [
        (flags[:2], "go together"),
        (flags[2:], "go together"),
        ([*flags[:3], str(tmp_path / "missing")], "No such file"),
        ([*flags[:3], str(tmp_path)], "Is a directory"),
        ([*flags[:3], another], "does not belong to"),
        ([*flags[:3], str(garbage)], "PEM format"),
        ([*flags[:3], str(locked)], "is encrypted"),
    ]:
        with pytest.raises(SystemExit):
            parse(wrong, {})
        said = capsys.readouterr().err
        assert hint in said
        assert "请" in said
