# What `--help` says, in the language of the locale. Needs environment.sh.
# shellcheck shell=bash

usage() { if [[ $SPEAKS == zh ]]; then usage_zh; else usage_en; fi; }

usage_en() {
    cat <<'EOF_USAGE'
Usage: start_with_gpu_management.sh [start|stop|restart|status|logs] [--name value]... [arguments of app.py]...

  start      the app, in this terminal or with --detach
  stop       what start has started; a container that was replaced is back
  restart    with the settings of the last start; other ones may be given. If it fails, the app that ran is back
  status     where the app and its models are; 3 if it does not run
  logs       the last lines; --follow goes on

Without --port they mean the one app that runs; if several do, they list them and fail.

A setting is a flag, else the variable GPU_TTS_NAME, else the variable NAME. Of DOCKER, DETACH, REPLACE and FOLLOW the variable
is 1. Others set HOST (shells, compilers) and CONTAINER_NAME (sandboxes), too: without the prefix, HOST counts only if it is an
address or localhost, and CONTAINER_NAME only together with --docker.

  --host              GPU_TTS_HOST              address to listen on (127.0.0.1)
  --port              GPU_TTS_PORT              port (7860)
  --gpu-id            GPU_TTS_GPU_ID            GPU as nvidia-smi numbers it, or none (most free memory)
  --gpu-idle-timeout  GPU_TTS_GPU_IDLE_TIMEOUT  idle this long: released: 600, 90s, 15m, 1h, -1 (600)
  --gpu-keep-warm     GPU_TTS_GPU_KEEP_WARM     stay on the GPU this long after a request, or auto (0)
  --gpu-snapshot-dir  GPU_TTS_GPU_SNAPSHOT_DIR  released weights are kept here (none)
  --model-path        GPU_TTS_MODEL_PATH        weights of Step-Audio-EditX (none: built-in engine)
  --step-audio-root   GPU_TTS_STEP_AUDIO_ROOT   checkout of Step-Audio-EditX
  --project-dir       GPU_TTS_PROJECT_DIR       folder of app.py (this script's)
  --venv-dir          GPU_TTS_VENV_DIR          Python environment (PROJECT_DIR/.venv); one that you made is never changed
  --detach            GPU_TTS_DETACH            run in the background; returns once it is ready
  --run-dir           GPU_TTS_RUN_DIR           log and pid of what runs (PROJECT_DIR/.run)
  --ready-timeout     GPU_TTS_READY_TIMEOUT     wait this many seconds for it (300)
  --stop-timeout      GPU_TTS_STOP_TIMEOUT      wait this many seconds for its end (60)
  --check                                       say what would be done, do nothing
  --help                                        this text; the arguments of app.py (--simulate-gpu, --auth, --max-upload ...)
                                                are told by `python app.py --help`

  --docker            GPU_TTS_DOCKER            in a container
  --container-name    GPU_TTS_CONTAINER_NAME    its name (step-audio-gpu-managed)
  --replace           GPU_TTS_REPLACE           put it in the place of one of that name
  --image             GPU_TTS_IMAGE             name of the image (gpu-managed-tts)
  --base-image        GPU_TTS_BASE_IMAGE        what it is built on; the image of a Step-Audio-EditX checkout for the real
                                                engine (python:3.11-slim-bookworm)

pip's own variables work as usual; while an image is built, PIP_INDEX_URL and PIP_EXTRA_INDEX_URL do. TORCH_INDEX_URL is where
PyTorch alone comes from: without a GPU, https://download.pytorch.org/whl/cpu saves several GB.
EOF_USAGE
}

usage_zh() {
    cat <<'EOF_USAGE'
用法：start_with_gpu_management.sh [start|stop|restart|status|logs] [--名称 值]... [app.py 的参数]...

  start      启动应用，在本终端或后台（--detach）
  stop       停止 start 启动的应用；被替换的容器恢复原名
  restart    按上次的设置重启，可另给新设置；失败时恢复原来运行的应用
  status     应用与模型的状态；未运行时返回 3
  logs       最后的日志；--follow 持续显示

不写 --port 时指正在运行的那一个应用；若有多个，则列出它们并返回失败。

每项设置依次取自参数、环境变量 GPU_TTS_名称、环境变量 名称。DOCKER、DETACH、REPLACE、FOLLOW 的变量值为 1。HOST（shell、编译器）和
CONTAINER_NAME（沙箱）也常由其他程序设置：不带前缀时，HOST 仅在其值为地址或 localhost 时有效，CONTAINER_NAME 仅与 --docker 一起使用时有效。

  --host              GPU_TTS_HOST              监听地址（127.0.0.1）
  --port              GPU_TTS_PORT              端口（7860）
  --gpu-id            GPU_TTS_GPU_ID            使用哪块 GPU（nvidia-smi 的编号）或 none（空闲显存最多的）
  --gpu-idle-timeout  GPU_TTS_GPU_IDLE_TIMEOUT  空闲多久后完全释放：600、90s、15m、1h、-1（600）
  --gpu-keep-warm     GPU_TTS_GPU_KEEP_WARM     请求后在 GPU 上保留多久，或 auto（0）
  --gpu-snapshot-dir  GPU_TTS_GPU_SNAPSHOT_DIR  已释放的权重保存在此（无）
  --model-path        GPU_TTS_MODEL_PATH        Step-Audio-EditX 的权重目录（不设则用内置引擎）
  --step-audio-root   GPU_TTS_STEP_AUDIO_ROOT   Step-Audio-EditX 的代码目录
  --project-dir       GPU_TTS_PROJECT_DIR       app.py 所在目录（本脚本所在目录）
  --venv-dir          GPU_TTS_VENV_DIR          Python 环境（PROJECT_DIR/.venv）；您自己创建的环境不会被改动
  --detach            GPU_TTS_DETACH            后台运行，就绪后返回
  --run-dir           GPU_TTS_RUN_DIR           日志与进程号（PROJECT_DIR/.run）
  --ready-timeout     GPU_TTS_READY_TIMEOUT     等待就绪的秒数（300）
  --stop-timeout      GPU_TTS_STOP_TIMEOUT      等待退出的秒数（60）
  --check                                       只说明将做什么，不执行
  --help                                        显示本说明；app.py 自己的参数（--simulate-gpu、--auth、--max-upload 等）见
                                                python app.py --help

  --docker            GPU_TTS_DOCKER            在容器中运行
  --container-name    GPU_TTS_CONTAINER_NAME    容器名（step-audio-gpu-managed）
  --replace           GPU_TTS_REPLACE           替换同名容器
  --image             GPU_TTS_IMAGE             镜像名（gpu-managed-tts）
  --base-image        GPU_TTS_BASE_IMAGE        基础镜像；真实引擎请用 Step-Audio-EditX 的镜像（python:3.11-slim-bookworm）

pip 的环境变量照常生效；构建镜像时，其中 PIP_INDEX_URL 和 PIP_EXTRA_INDEX_URL 有效。TORCH_INDEX_URL 仅用于 PyTorch：没有 GPU 时设为
https://download.pytorch.org/whl/cpu 可少下载数 GB。
EOF_USAGE
}
