"""Serves the Step-Audio-EditX page, with a model that is moved off the GPU between requests.

Composition root: settings -> device -> engine -> manager -> page. Heavy imports are inside functions, so that
``--help`` and a wrong flag answer at once.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict
from urllib.parse import urlsplit

from residency.errors import ResidencyError, needing
from residency.launch.lifetime import Signals, recordings_folder
from residency.launch.settings import Settings, parse
from residency.sentences import Sentence

if TYPE_CHECKING:
    from gpu_manager import GPUResourceManager
    from residency.contracts import Engine
    from residency.web.api.speech_calls import SpeechCalls
    from residency.web.editx_tab import EditxTab
    from residency.web.page import Page
    from residency.web.server.api_keys import ApiKeys
    from tts_gpu_managed import GPUManagedTTS

__all__ = ["EditxTab", "main"]

logger = logging.getLogger("app")

_OPEN_PAGE = Sentence(
    "--api-key closes /v1 only: everyone who reaches the page can still have texts spoken there, and with the page's "
    "own calls (/gradio_api). Add --auth USER:PASSWORD to close them too.",
    "--api-key 只保护 /v1：能访问页面的人仍可在页面上、或通过页面自身的接口（/gradio_api）合成语音。"
    "如需一并保护，请加上 --auth 用户名:密码。",
)

DELIVERED_WITHIN_S = 5.0
"""Timeout for clients to fetch finished results."""

REFUSED_WITHIN_S = 1.0
"""Timeout for clients to receive the refusals of waiting requests."""

MOVED_WITHIN_S = 5.0
"""Timeout for the release of the models, after the grace period of running requests."""

_abandoned = threading.Event()
"""Set if a request or a move still runs at exit."""


class _TabOptions(TypedDict, total=False):
    """Arguments of `EditxTab` for an engine."""

    edit_types: Mapping[str, Sequence[str]]
    clone_appends: bool
    more_tags: Sequence[str]
    max_target_text: int


@dataclass(frozen=True)
class _Chosen:
    """The chosen engine.

    Attributes:
        build: builds it for a torch device.
        page: options of its tab.
        name: that in ``GET /v1/models``.
        check_text, check_audio: refuse what it is known not to support, without loading it; see `GPUManagedTTS`.
    """

    build: Callable[[str], Engine]
    page: _TabOptions
    name: str
    check_text: Callable[[str], object] | None = None
    check_audio: Callable[[str], object] | None = None


def __getattr__(name: str) -> Any:
    if name == "EditxTab":  # imported on first use, because it imports Gradio
        from residency.web.editx_tab import EditxTab

        return EditxTab
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until Ctrl-C or SIGTERM; returns the exit code."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime's telemetry includes model names
    settings = parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        with Signals() as signals, recordings_folder(settings.tmp_dir, signals) as folder:
            _serve(replace(settings, tmp_dir=folder), signals)
    except KeyboardInterrupt:
        return 0
    except (ResidencyError, OSError) as error:
        logger.error("%s", error)
        return 1
    return 0


def _serve(settings: Settings, signals: Signals) -> None:
    from residency.launch.listening import check_port, reach_directly
    from residency.web.server.connections import raise_descriptor_limit

    raise_descriptor_limit()
    check_port(settings.server_name, settings.server_port)
    reach_directly(settings.server_name)
    chosen = choose_engine(settings)
    from residency.addresses import serving
    from residency.web.api.control import build as build_api
    from residency.web.editx_tab import EditxTab
    from residency.web.page import Page
    from residency.web.server.api_keys import ApiKeys
    from residency.web.server.hosts import Hosts
    from residency.web.server.permissions import Permissions

    manager = make_manager(settings) if settings.enable_gpu_management else None
    engine = managed(settings, manager, chosen) if manager else chosen.build(_torch_device(None))
    # Behind a tunnel, or a proxy that sends no client address, remote requests seem local.
    passed_on = settings.share or "://" in settings.root_path
    permissions = Permissions(settings.control_token, trust_local=not passed_on)
    recognize = _recognizer(settings, manager)
    tab = EditxTab(settings, None, engine, recognize=recognize, permissions=permissions, **chosen.page)
    page = Page(tab, manager, permissions, settings.max_upload)
    signed_in = page.signed_in if settings.auth else None
    keys = ApiKeys(settings.api_keys, permissions, signed_in)
    if settings.api_keys and not settings.auth:
        logger.warning("%s", _OPEN_PAGE)
    speech = _speech_calls(settings, tab, keys, chosen.name)
    api = build_api(manager, permissions, tab.panel.news if tab.panel else None, signed_in, lambda: page.serves, speech)
    names = (settings.server_name, *settings.allowed_hosts, urlsplit(settings.root_path).hostname or "")
    signals.before_quit(page.close_tunnels)
    try:
        public_link = page.serve(
            settings.server_name,
            settings.server_port,
            share=settings.share,
            auth=settings.auth,
            hosts=Hosts(names, keys.passes),
            root_path=settings.root_path,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
            api=api,
            origins=settings.cors_origins,
        )
        scheme = "https" if settings.ssl_certfile else "http"
        logger.info("%s", serving(settings.server_name, settings.server_port, scheme))
        if settings.root_path:
            logger.info("Behind a reverse proxy / 反向代理下的地址：%s", settings.root_path)
        if settings.share:
            logger.info("Public link / 公开链接：%s", public_link or "could not be made / 创建失败")
        signals.wait()
    finally:
        signals.disable_interrupt()
        _end(page, manager, settings.shutdown_grace)


def _speech_calls(settings: Settings, tab: EditxTab, keys: ApiKeys, model: str) -> SpeechCalls:
    from residency.scheduling.policies import keep_alive_seconds
    from residency.web.api.slots import Slots
    from residency.web.api.speech_calls import SpeechCalls
    from residency.web.speech.speaking import Speaker

    tab.voices.sweep()
    return SpeechCalls(
        service=tab.speech,
        speaker=Speaker(tab.speech, tab.voices),
        recordings=tab.recordings,
        keys=keys,
        model=model,
        slots=Slots(settings.max_requests),
        watching=tab.watching,
        keep_alive=keep_alive_seconds,
    )


def choose_engine(settings: Settings) -> _Chosen:
    """Returns the engine of the settings. Reports missing packages and files of it, and unsuitable flags, immediately.

    Raises `EngineUnavailable` and `InvalidInput`, see `step_audio.shortcomings`.
    """
    if settings.engine == "builtin":
        with needing("builtin"):
            from residency.engines.builtin import BuiltinEngine, supported_edit_types
            from residency.engines.text import speakable

        return _Chosen(
            lambda torch_device: BuiltinEngine(device=torch_device),
            {"edit_types": supported_edit_types()},
            "builtin",
            check_text=speakable,
        )
    if settings.engine == "ray":
        from residency.cluster.connection import connect

        replicas = connect(settings.ray_address)
        page: _TabOptions = {"edit_types": replicas.edit_types, "max_target_text": replicas.target_characters}
        return _Chosen(lambda torch_device: replicas, page, replicas.model)
    with needing("step-audio"):
        from residency.engines import step_audio
        from residency.engines.step_audio_facts import TARGET_CHARACTERS
        from residency.engines.text import spoken_by_step_audio

    model_path = str(settings.model_path)
    options: dict[str, Any] = {
        "root": settings.step_audio_root,
        "model_source": settings.model_source,
        "tts_model_id": settings.tts_model_id,
        "managed": settings.enable_gpu_management,
        **settings.engine_flags(),
    }
    for shortcoming in step_audio.shortcomings(model_path, **options):
        logger.warning("%s", shortcoming)
    generation = step_audio.generation(settings.step_audio_root)
    context_tokens = settings.max_model_len if "max_model_len" in generation.flags else None
    return _Chosen(
        lambda torch_device: step_audio.build(model_path, **options),
        {
            "clone_appends": generation.clone_appends,
            "more_tags": generation.tags,
            "max_target_text": TARGET_CHARACTERS,
        },
        "step-audio-editx",
        check_text=spoken_by_step_audio,
        check_audio=step_audio.audio_check(settings.step_audio_root, context_tokens),
    )


def _torch_device(manager: GPUResourceManager | None) -> str:
    from residency.devices import find_device

    return (manager.device if manager else find_device()).torch_device


def make_manager(settings: Settings) -> GPUResourceManager:
    from gpu_manager import Sharing, SimulatedDevice, find_device, get_gpu_manager

    card, limit = settings.simulate_gpu, settings.gpu_host_memory_limit
    manager = get_gpu_manager(
        SimulatedDevice(card.capacity_bytes, limit, card.context_bytes, card.shared) if card else find_device(limit),
        sharing=Sharing(settings.gpu_headroom, settings.gpu_neighbor, settings.gpu_share_dir),
        keep_warm=settings.gpu_keep_warm,
        idle_timeout=settings.gpu_idle_timeout,
        snapshot_dir=settings.gpu_snapshot_dir,
        snapshot_limit_bytes=settings.gpu_snapshot_limit,
        budget_bytes=settings.gpu_budget,
        wait_timeout=settings.gpu_wait_timeout,
        isolation=settings.gpu_isolation,
        residue=settings.gpu_residue,
    )
    logger.info("🚀 GPU 管理已启用 / GPU management is on: %s", manager.device.name)
    return manager


def managed(settings: Settings, manager: GPUResourceManager, chosen: _Chosen, name: str = "tts") -> GPUManagedTTS:
    """Returns the chosen engine, as the managed model ``name``."""
    from tts_gpu_managed import GPUManagedTTS

    build, torch_device = chosen.build, manager.device.torch_device
    return GPUManagedTTS(
        settings.model_path,
        gpu_idle_timeout=settings.gpu_idle_timeout,
        gpu_keep_warm=settings.gpu_keep_warm,
        gpu_load_timeout=settings.gpu_load_timeout,
        manager=manager,
        load=lambda: build(torch_device),
        name=name,
        check_text=chosen.check_text,
        check_audio=chosen.check_audio,
    )


def _recognizer(settings: Settings, manager: GPUResourceManager | None) -> Callable[[str], str] | None:
    """Returns the speech recognition if enabled, as the managed model ``asr`` if there is a manager."""
    if not settings.enable_auto_transcribe:
        return None
    torch_device = _torch_device(manager)

    def load() -> Callable[[str], str]:
        if settings.engine == "step-audio" and settings.asr_model is None:
            from residency.engines.step_audio import build_recognizer

            return build_recognizer(settings.step_audio_root)
        with needing("asr"):
            from residency.engines.asr import DEFAULT_MODEL, Recognizer

        return Recognizer.load(settings.asr_model or DEFAULT_MODEL, torch_device)

    if manager is None:
        return load()
    from residency.web.speech.service import RECOGNIZER
    from tts_gpu_managed import ask

    manager.register(RECOGNIZER, load, load_timeout=settings.gpu_load_timeout)
    return lambda recording: ask(manager, RECOGNIZER, lambda recognize: recognize(recording))


def _end(page: Page, manager: GPUResourceManager | None, grace_s: float) -> None:
    """Refuses new requests, waits until running ones are delivered, releases the models, then stops the server."""
    began_s = time.monotonic()

    def left_s() -> float:
        return max(0.0, began_s + grace_s - time.monotonic())

    page.refuse()
    if page.speech.running and grace_s:
        allowed = "" if grace_s == math.inf else f" ({grace_s:g} s)"
        logger.info(
            "Shutting down; a running request may finish%s, a second signal quits at once. / "
            "正在关闭；正在运行的请求可以完成%s，再次发送信号则立即退出。", allowed, allowed,
        )  # fmt: skip
    ended = manager is None or _closed(manager, grace_s)
    idle = page.speech.wait_until_idle(left_s())
    # Refusals need time for delivery too, even if a running request is abandoned.
    page.middleware.wait_until_quiet(DELIVERED_WITHIN_S if idle else REFUSED_WITHIN_S)
    if page.speech.running:
        logger.warning("A request is still running; exiting without waiting. / 仍有请求在运行，不再等待，直接退出。")
    elif not ended:
        logger.warning("A model is still being moved; exiting without waiting. / 模型仍在搬移，不再等待，直接退出。")
    if page.speech.running or not ended:
        _abandoned.set()
    # Hide the server's errors about requests that this intended shutdown interrupts.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    page.close()


def _closed(manager: GPUResourceManager, grace_s: float) -> bool:
    """Closes the manager; returns False if a request or a move exceeds its time limit."""
    if manager.close(grace_s):
        return True
    in_use = any(model["leases"] for model in manager.status()["models"].values())
    return not in_use and manager.close(MOVED_WITHIN_S)


if __name__ == "__main__":
    code = main()
    if _abandoned.is_set():
        # Skip interpreter shutdown, which could crash threads in native code.
        logging.shutdown()
        os._exit(code)
    sys.exit(code)
