"""Other GPU servers on this machine, and how each kind is asked to give up what it holds idle.

A kind is a file of this folder; its docstring has the requests, their source, and what the server does not tell.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import SplitResult, unquote, urlsplit

from ..addresses import bracketed
from ..errors import InvalidInput
from . import discovery
from .comfyui import ComfyUI
from .contract import Held, Neighbor
from .llama_cpp import LlamaCpp
from .llama_swap import LlamaSwap
from .ollama import Ollama
from .sdwebui import StableDiffusionWebUI
from .server import Server
from .sglang import SGLang
from .this_project import ThisProject
from .vllm import VLLM

__all__ = ["KINDS", "Held", "Neighbor", "find", "neighbor", "parse"]

_SERVERS: dict[str, type[Server]] = {
    kind.kind: kind for kind in (Ollama, ComfyUI, VLLM, SGLang, LlamaSwap, LlamaCpp, StableDiffusionWebUI, ThisProject)
}
KINDS: tuple[str, ...] = tuple(_SERVERS)


def neighbor(kind: str, url: str, token: str | None = None) -> Neighbor:
    """Returns the server of this kind at this address; sends nothing. Raises `InvalidInput`.

    ``token``: ``user:password``, or a bearer token; without it, the user information of the address, if it has one.
    """
    if kind not in _SERVERS:  # not quoted: without a kind, it is an address with a token
        raise InvalidInput(
            f"This is no kind of GPU server that can be asked for memory; known: {', '.join(KINDS)}",
            f"这不是可请求让出显存的 GPU 服务类型；支持：{'、'.join(KINDS)}",
        )
    address = _address(url)
    if token is None and address.username is not None:
        token = ":".join(unquote(part) for part in (address.username, address.password) if part is not None)
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise InvalidInput(
            f"The token for {kind} has characters other than visible ASCII, or is empty",
            f"{kind} 的令牌为空，或含有可见 ASCII 以外的字符",
        )
    host = bracketed((address.hostname or "").lower())
    port = "" if address.port is None else f":{address.port}"
    return _SERVERS[kind](f"{address.scheme}://{host}{port}{address.path.rstrip('/')}", token)


def parse(text: str) -> Neighbor | None:
    """Reads a value of ``--gpu-neighbor``: ``KIND=URL``, or ``auto`` (None: use `find`). Raises `InvalidInput`.

    A token stands in the address: ``http://TOKEN@HOST:PORT`` is sent as a bearer token,
    ``http://USER:PASSWORD@HOST:PORT`` by basic authentication. Give it in the environment variable of the flag rather
    than on the command line, which other users of the machine see. There is no token for all neighbours: servers that
    are found by ``auto`` would get it, too.
    """
    if text.strip().lower() == "auto":
        return None
    kind, equals, url = text.strip().partition("=")
    if not equals:
        raise InvalidInput(
            f"Give a GPU server as KIND=URL, such as ollama=http://127.0.0.1:11434, or auto; kinds: {', '.join(KINDS)}",
            f"请以 KIND=URL 的形式指定 GPU 服务，例如 ollama=http://127.0.0.1:11434，或 auto；类型：{'、'.join(KINDS)}",
        )
    return neighbor(kind.strip().lower(), url.strip())


def find(pids: Collection[int], own_pids: Collection[int]) -> list[tuple[int, Neighbor]]:
    """Returns the server of each of these processes, which the driver names as users of the card, where it finds one.

    Looks at the ports on which a process or one of its parents listens, the oldest first; the command line or the
    working folder suggests a kind, and `Neighbor.held` confirms it. Processes of a server have the same one. Left out:
    ``own_pids`` with their children and parents, such as a broker that has started them; and servers that can only be
    given by address: those that need a token or a setting, of other users, and in containers, whose ports are not known
    here. Sends requests (2 s each) to ports of such programs.
    """
    return discovery.search(pids, own_pids, tuple(_SERVERS.values()))


def _address(url: str) -> SplitResult:
    try:
        address = urlsplit(url)
        port = address.port
        (address.hostname or "").encode("idna")
    except ValueError:
        port = 0
    if (
        port == 0
        or address.scheme not in ("http", "https")
        or not address.hostname
        or address.query
        or address.fragment
        or not re.fullmatch(r"[\x21-\x7e]+", url)
    ):
        raise InvalidInput(
            "This is no address of a server; give it as http://127.0.0.1:11434, without ? and #",
            "这不是服务地址；请按 http://127.0.0.1:11434 的形式填写，不含 ? 和 #",
        )
    return address
