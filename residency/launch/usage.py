"""Text of ``start_with_gpu_management.sh --help``, in the language of the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from .options import SETTINGS
from .terminal import choose

_EN = """\
Usage: start_with_gpu_management.sh [start|stop|restart|status|logs] [--name value]... [arguments of app.py]...

  start      the app, in this terminal or with --detach
  stop       what start has started; a container that was replaced is back
  restart    with the settings of the last start; other ones may be given. If it fails, the app that ran is back
  status     where the app and its models are; 3 if it does not run
  logs       the last lines; --follow goes on

Without --port they mean the one app that runs; if several do, they list them and fail.

A setting is a flag, else the variable GPU_TTS_NAME, else the variable NAME. Of DOCKER, DETACH, REPLACE and FOLLOW the
variable is 1. Others set HOST (shells, compilers) and CONTAINER_NAME (sandboxes), too: without the prefix, HOST counts
only if it is an address or localhost, and CONTAINER_NAME only together with --docker.

{rows}
  --check                                       say what would be done, do nothing
  --help                                        this text; `python app.py --help` lists the arguments of app.py
                                                (--simulate-gpu, --auth, --max-upload ...)

pip's own variables work as usual; while an image is built, PIP_INDEX_URL and PIP_EXTRA_INDEX_URL do. TORCH_INDEX_URL
is where PyTorch alone comes from: without a GPU, https://download.pytorch.org/whl/cpu saves several GB."""

_ZH = """\
用法：start_with_gpu_management.sh [start|stop|restart|status|logs] [--名称 值]... [app.py 的参数]...

  start      启动应用，在本终端或后台（--detach）
  stop       停止 start 启动的应用；被替换的容器恢复原名
  restart    按上次的设置重启，可另给新设置；失败时恢复原来运行的应用
  status     应用与模型的状态；未运行时返回 3
  logs       最后的日志；--follow 持续显示

不写 --port 时指正在运行的那一个应用；若有多个，则列出它们并返回失败。

每项设置依次取自参数、环境变量 GPU_TTS_名称、环境变量 名称。DOCKER、DETACH、REPLACE、FOLLOW 的变量值为 1。
HOST（shell、编译器）和 CONTAINER_NAME（沙箱）也常由其他程序设置：不带前缀时，HOST 仅在其值为地址或 localhost 时有效，
CONTAINER_NAME 仅与 --docker 一起使用时有效。

{rows}
  --check                                       只说明将做什么，不执行
  --help                                        显示本说明；app.py 自己的参数（--simulate-gpu、--auth 等）
                                                见 python app.py --help

pip 的环境变量照常生效；构建镜像时，其中 PIP_INDEX_URL 和 PIP_EXTRA_INDEX_URL 有效。
TORCH_INDEX_URL 仅用于 PyTorch：没有 GPU 时设为 https://download.pytorch.org/whl/cpu 可少下载数 GB。"""


def usage() -> str:
    return choose(_EN, _ZH).format(rows="\n".join(_rows()))


def _rows() -> Iterator[str]:
    for name, setting in SETTINGS.items():
        flag = "--" + name.lower().replace("_", "-")
        if said := choose(setting.metadata["en"], setting.metadata["zh"]):
            yield f"  {flag:<19} {'GPU_TTS_' + name:<25} {said}"
