"""Readers of the values of flags: each converts a text, and raises `InvalidInput` with an example."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from ..addresses import is_address, without_mapping
from ..errors import InvalidInput
from ..units import UNITS_BYTES, readable_bytes

T = TypeVar("T")

_LARGEST_BYTES = 1 << 60
_KEY_CHARACTERS = 16
_ADDRESS = r"(https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(:(?P<port>\d+))?)?(?P<path>(/[A-Za-z0-9._~!$&'()*+,;=:@-]+)*)"
#: Invalid as root paths: ambiguous behind a proxy that removes the root path.
_OWN_PATHS = {"assets", "config", "docs", "gpu", "gradio_api", "healthz", "login", "logout", "metrics", "openapi.json",
              "readyz", "static", "svelte", "theme.css"}  # fmt: skip


def size_bytes(text: str) -> int:
    """Parses ``48GB``, ``48GiB`` or ``512MB``; a GB is 2**30 bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])I?B?", text.strip().upper())
    nbytes = float(match[1]) * UNITS_BYTES[match[2] + "B"] if match else 0
    if not 1 <= nbytes <= _LARGEST_BYTES:
        raise InvalidInput(
            f"{text!r} is not a valid size: write 48GB or 512MB", f"{text!r} 不是有效的大小：请写 48GB 或 512MB"
        )
    return int(nbytes)


@dataclass(frozen=True)
class SimulatedCard:
    """Sizes in bytes; ``shared``: the name of a card that several programs use."""

    capacity_bytes: int
    context_bytes: int = 0
    shared: str | None = None


def simulated_card(text: str) -> SimulatedCard:
    """Parses ``48GB``, ``48GB,context=400MB``, ``48GB,shared=NAME``, or all three."""
    size, *options = text.split(",")
    named = {name.strip(): value.strip() for name, _, value in (option.partition("=") for option in options)}
    if named.keys() - {"context", "shared"} or len(named) < len(options):
        raise InvalidInput(
            f"{text!r} is not a valid simulated GPU: write its size (48GB), and after commas, if wanted, the size of "
            f"a CUDA context and a name under which other programs use the same card "
            f"(48GB,context=400MB,shared=NAME)",
            f"{text!r} 不是有效的模拟 GPU：请写显存容量（48GB），需要时在逗号后写 CUDA 上下文的大小，以及供其他程序"
            f"共用的名称（48GB,context=400MB,shared=NAME）",
        )
    name = named.get("shared")
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", name, re.ASCII):
        raise InvalidInput(
            f"{name!r} cannot be the name of a simulated GPU: use up to 64 letters, digits, and _ . -",
            f"{name!r} 不能用作模拟 GPU 的名称：请用不超过 64 个字母、数字及 _ . -",
        )
    capacity_bytes = size_bytes(size)
    context_bytes = size_bytes(named["context"]) if "context" in named else 0
    if context_bytes >= capacity_bytes:
        size, context = readable_bytes(capacity_bytes), readable_bytes(context_bytes)
        raise InvalidInput(
            f"a CUDA context of {context} does not fit on a simulated GPU of {size}: write 48GB,context=400MB",
            f"{context} 的 CUDA 上下文放不进 {size} 的模拟 GPU：请写 48GB,context=400MB",
        )
    return SimulatedCard(capacity_bytes, context_bytes, name)


def sendable(token: str) -> str:
    """Strips a token; raises `InvalidInput`, without the token, if it is not valid in an HTTP header."""
    if not (token.strip().isascii() and token.strip().isprintable()):
        raise InvalidInput(
            "a token has only Latin letters, digits and signs, since others cannot be sent (--control-token, --token, "
            "GPU_CONTROL_TOKEN, --api-key)",
            "令牌只能包含英文字母、数字和符号，其他字符无法发送（--control-token、--token、GPU_CONTROL_TOKEN、--api-key）",
        )
    return token.strip()


def login(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise InvalidInput("write USER:PASSWORD, both not empty", "请写 用户名:密码，两者都不能为空")
    return user, password


def host_names(text: str) -> tuple[str, ...]:
    """Converts host names to the form sent by browsers: lower case, non-Latin scripts as ``xn--...``."""
    names = []
    for given in filter(None, map(str.strip, text.split(","))):
        try:
            name = (urlsplit(given if "//" in given else f"//{given}").hostname or "").encode("idna").decode()
        except ValueError:  # also of encoding
            name = ""
        if not re.fullmatch(r"[\w.-]+", name):
            raise InvalidInput(
                f"{given!r} is not a valid host name: write one as in the browser's address line, speech.example.org",
                f"{given!r} 不是有效的主机名：请写浏览器地址栏中的名称，如 speech.example.org",
            )
        names.append(name.removesuffix("."))
    return tuple(names)


def neighbors(text: str) -> tuple[str, ...]:
    """Splits descriptions of GPU servers at commas; raises `InvalidInput` for one that is none."""
    found = tuple(filter(None, map(str.strip, text.split(","))))
    if found:
        from ..neighbors import parse  # slow: HTTP and processes

        for each in found:
            parse(each)
    return found


def api_keys(text: str) -> tuple[str, ...]:
    """Splits API keys at commas; raises `InvalidInput`, without the key, if there is none, or one is unsuitable."""
    keys = tuple(filter(None, map(str.strip, text.split(","))))
    if not keys or min(map(len, keys)) < _KEY_CHARACTERS:
        raise InvalidInput(
            f"an API key has at least {_KEY_CHARACTERS} characters, so that nobody guesses it: make one with openssl "
            f"rand -hex 16 (--api-key)",
            f"API 密钥至少 {_KEY_CHARACTERS} 个字符，以免被猜到：可用 openssl rand -hex 16 生成（--api-key）",
        )
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise InvalidInput(
            "an API key has only Latin letters, digits and signs, since others cannot be sent (--api-key)",
            "API 密钥只能包含英文字母、数字和符号，其他字符无法发送（--api-key）",
        )
    return keys


def site_origins(text: str) -> tuple[str, ...]:
    """Converts sites to the form of the header Origin: ``https://example.org``, with the port if it is unusual."""
    origins = []
    for given in filter(None, map(str.strip, text.split(","))):
        try:
            site = urlsplit(given)
            host, port = site.hostname or "", site.port
        except ValueError:
            site, host, port = urlsplit(""), "", None
        if site.scheme not in ("http", "https") or not host or site.path not in ("", "/"):
            raise InvalidInput(
                f"{given!r} is not a site: write one as https://example.org, without a path",
                f"{given!r} 不是有效的网站：请写成 https://example.org，不带路径",
            )
        usual = port in (None, {"http": 80, "https": 443}[site.scheme])
        origins.append(f"{site.scheme}://{host}" + ("" if usual else f":{port}"))
    return tuple(origins)


def listening_address(text: str) -> str:
    """Removes brackets of an IPv6 address; converts an IPv4-mapped address to IPv4."""
    address = without_mapping(text[1:-1] if text.startswith("[") and text.endswith("]") else text)
    # IPv6 addresses may have a scope (fe80::1%eth0). Excludes 0, 127.1 and 0x7f000001, which are addresses, too.
    if not is_address(address) and not re.fullmatch(r"(?=.*[A-Za-z])(?!0x)[A-Za-z0-9_.-]+", address):
        raise InvalidInput(
            f"{text!r} is not an address of this machine: give 0.0.0.0 for all, :: for all with IPv6, 127.0.0.1 for "
            "this machine only, or one of its addresses or names",
            f"{text!r} 不是本机的地址：请写 0.0.0.0（所有地址）、::（包括 IPv6）、127.0.0.1（仅本机），"
            "或本机的某个地址或名称",
        )
    return address


def site_path(text: str) -> str:
    """Removes a final slash of a path or a whole address; empty: the root of the site."""
    given = text.strip().rstrip("/")
    parts = re.fullmatch(_ADDRESS, given)
    segments = parts["path"].split("/")[1:] if parts else ["."]
    if {".", ".."} & set(segments) or (parts and parts["port"] and not 1 <= int(parts["port"]) <= 65535):
        raise InvalidInput(
            f"{text!r} is not a valid path of a site: write /tts, or https://example.com/tts (--root-path, "
            f"GPU_TTS_ROOT_PATH, GRADIO_ROOT_PATH)",
            f"{text!r} 不是有效的站点路径：请写 /tts 或 https://example.com/tts（--root-path、GPU_TTS_ROOT_PATH、"
            f"GRADIO_ROOT_PATH）",
        )
    if len(segments) == 1 and segments[0] in _OWN_PATHS:
        raise InvalidInput(
            f"/{segments[0]} is a path of the app itself: choose another, such as /tts",
            f"/{segments[0]} 是应用自身使用的路径：请换一个，例如 /tts",
        )
    return given


def count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise InvalidInput(
            f"{text!r} is not a valid number: give 1 or more", f"{text!r} 不是有效的数量：请写 1 或更大的数"
        )
    return int(text)


def memory_share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= 1:
        raise InvalidInput(
            f"{text!r} is not a valid share: give a number above 0, at most 1, such as 0.5",
            f"{text!r} 不是有效的比例：请写大于 0、不超过 1 的数，如 0.5",
        )
    return value


def folder_path(text: str) -> str:
    if not text:
        raise InvalidInput("no folder is named: give one, or leave the flag out", "未指定目录：请指定，或去掉该参数")
    return os.path.expanduser(text)


def port_number(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise InvalidInput(f"{text!r} is not a valid port: give 1 to 65535", f"{text!r} 不是有效端口：请写 1 到 65535")
    return int(text)


def checked(read: Callable[[str], T]) -> Callable[[str], T]:
    """Returns an argparse type that shows the message of `InvalidInput`; argparse hides those of other exceptions."""

    def convert(text: str) -> T:
        try:
            return read(text)
        except InvalidInput as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert
