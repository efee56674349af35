#!/usr/bin/env bash
# Starts the app with GPU management on a machine that has nothing but Python: `--help` tells the settings.
set -euo pipefail

here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
# shellcheck source=scripts/environment.sh
source "$here/scripts/environment.sh"

usage() {
    cat <<'EOF_USAGE'
Usage / 用法: start_with_gpu_management.sh [--name value | --name=value]... [arguments of app.py]...

A setting is a flag or an environment variable; the flag wins.
每项设置可用参数或环境变量给出，参数优先。

  --host              HOST              address to listen on / 监听地址 (127.0.0.1)
  --port              PORT              port / 端口 (7860)
  --gpu-id            GPU_ID            GPU as nvidia-smi numbers it / 使用哪块 GPU (most free memory / 空闲显存最多的)
  --gpu-idle-timeout  GPU_IDLE_TIMEOUT  idle this long: released / 空闲多久后完全释放: 600, 90s, 15m, 1h, -1 (600)
  --gpu-keep-warm     GPU_KEEP_WARM     stay on the GPU this long after a request / 请求后在 GPU 上保留多久 (0)
  --model-path        MODEL_PATH        weights of Step-Audio-EditX / 模型权重目录 (none: built-in engine / 不设则用内置引擎)
  --step-audio-root   STEP_AUDIO_ROOT   checkout of Step-Audio-EditX / 其代码目录
  --project-dir       PROJECT_DIR       folder of app.py / app.py 所在目录 (this script's / 本脚本所在目录)
  --venv-dir          VENV_DIR          Python environment / Python 环境 (PROJECT_DIR/.venv); one that you made is never
                                        changed / 您自己创建的环境不会被改动
  --check                               say what would be done, do nothing / 只说明将做什么，不执行
  --help                                this text / 显示本说明

pip's own variables work as usual (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...). TORCH_INDEX_URL is where PyTorch alone comes
from: without a GPU, https://download.pytorch.org/whl/cpu saves several GB.
pip 的环境变量照常生效。TORCH_INDEX_URL 仅用于 PyTorch：没有 GPU 时设为 https://download.pytorch.org/whl/cpu 可少下载数 GB。
EOF_USAGE
}

# Everything that is no setting of this script goes on to app.py.
read_arguments() {
    local setting value
    check=no
    arguments=(--enable-gpu-management)
    while (($#)); do
        case ${1%%=*} in
            --host | --server-name) setting=HOST ;;
            --port | --server-port) setting=PORT ;;
            --gpu-id) setting=GPU_ID ;;
            --gpu-idle-timeout) setting=GPU_IDLE_TIMEOUT ;;
            --gpu-keep-warm) setting=GPU_KEEP_WARM ;;
            --model-path) setting=MODEL_PATH ;;
            --step-audio-root) setting=STEP_AUDIO_ROOT ;;
            --project-dir) setting=PROJECT_DIR ;;
            --venv-dir) setting=VENV_DIR ;;
            --docker | --container-name) fail "$1 is not available yet; leave it out" "$1 尚未提供，请去掉" ;;
            --help | -h)
                usage
                exit 0
                ;;
            *)
                if [[ $1 == --check ]]; then check=yes; else arguments+=("$1"); fi
                shift
                continue
                ;;
        esac
        if [[ $1 == *=* ]]; then
            value=${1#*=}
        else
            (($# > 1)) || fail "$1 needs a value" "$1 需要一个值"
            value=$2
            shift
        fi
        shift
        printf -v "$setting" '%s' "$value"
    done
}

check_settings() {
    local duration='[0-9]+(\.[0-9]+)?[smh]?'
    if [[ ! $PORT =~ ^[1-9][0-9]{0,4}$ ]] || ((PORT > 65535)); then
        fail "PORT '$PORT' is no port: give 1 to 65535" "PORT '$PORT' 不是有效端口：请写 1 到 65535"
    fi
    [[ $GPU_IDLE_TIMEOUT =~ ^(-1|$duration)$ ]] ||
        fail "GPU_IDLE_TIMEOUT '$GPU_IDLE_TIMEOUT' is no duration: give seconds or 90s, 15m, 1h; -1 is never" \
            "GPU_IDLE_TIMEOUT '$GPU_IDLE_TIMEOUT' 不是有效时长：请写秒数或 90s、15m、1h；-1 表示永不"
    [[ $GPU_KEEP_WARM =~ ^(-1|auto|$duration)$ ]] ||
        fail "GPU_KEEP_WARM '$GPU_KEEP_WARM' is no duration: give seconds or 90s, 15m, 1h; -1 is for ever" \
            "GPU_KEEP_WARM '$GPU_KEEP_WARM' 不是有效时长：请写秒数或 90s、15m、1h；-1 表示一直保留"
    [[ -f $PROJECT_DIR/app.py && -f $PROJECT_DIR/requirements.txt ]] ||
        fail "PROJECT_DIR '$PROJECT_DIR' has no app.py and requirements.txt: give this project's folder" \
            "PROJECT_DIR '$PROJECT_DIR' 中没有 app.py 和 requirements.txt：请指向本项目目录"
    # With a hub as its source the model path may be an id.
    [[ -z $MODEL_PATH || -e $MODEL_PATH || " ${arguments[*]} " =~ \ --model-source[=\ ](huggingface|modelscope)\  ]] ||
        fail "MODEL_PATH '$MODEL_PATH' does not exist: give the folder with the weights, or leave it out for the built-in engine" \
            "MODEL_PATH '$MODEL_PATH' 不存在：请指向权重目录，或不设置以使用内置引擎"
    [[ -z $STEP_AUDIO_ROOT || -d $STEP_AUDIO_ROOT ]] ||
        fail "STEP_AUDIO_ROOT '$STEP_AUDIO_ROOT' is no folder: give a checkout of Step-Audio-EditX" \
            "STEP_AUDIO_ROOT '$STEP_AUDIO_ROOT' 不是目录：请指向 Step-Audio-EditX 的代码目录"
}

# Binds as the server will; with the port in use, says who holds it and which one is free.
check_port() {
    local python=$1 answer
    answer=$(
        "$python" -I - "$HOST" "$PORT" <<'PYTHON'
import errno
import socket
import sys

host, wanted = sys.argv[1], int(sys.argv[2])


def refusal(port):
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
    except OSError as error:
        return error


reason = refusal(wanted)
if reason and reason.errno == errno.EADDRINUSE:
    others = (*range(wanted + 1, 65536), *range(1024, wanted))
    print("busy", next(port for port in others if not refusal(port)))
elif reason:
    print("refused", reason)
PYTHON
    )
    case $answer in
        busy*)
            fail "Port $PORT on $HOST is in use$(holder_of_port). Stop that program or choose another port: --port ${answer#busy }" \
                "$HOST 的端口 $PORT 已被占用。请停止占用它的程序，或换一个端口：--port ${answer#busy }"
            ;;
        refused*)
            fail "Cannot listen on HOST '$HOST', PORT $PORT: ${answer#refused }. Give an address of this machine (--host 127.0.0.1) and a port above 1023" \
                "无法监听 HOST '$HOST' PORT $PORT。请使用本机地址（--host 127.0.0.1）和大于 1023 的端口"
            ;;
    esac
}

holder_of_port() {
    local pid
    pid=$(ss -Hltnp "sport = :$PORT" 2>/dev/null | sed -n 's/.*pid=\([0-9]*\).*/\1/p' | sort -u) || true
    pid=${pid:-$(lsof -nP -t -iTCP:"$PORT" -sTCP:LISTEN 2>/dev/null)} || true
    pid=${pid%%$'\n'*}
    [[ -z $pid ]] || printf ' by pid %s: %s' "$pid" "$(ps -o args= -p "$pid" | cut -c 1-80)"
}

# Sets CUDA_VISIBLE_DEVICES to GPU_ID or to the GPU with the most free memory.
choose_gpu() {
    local list index free name chosen='' chosen_free=-1 chosen_name='' known=''
    if [[ -z $GPU_ID && -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        say "GPU: as CUDA_VISIBLE_DEVICES='$CUDA_VISIBLE_DEVICES' says" "GPU：按 CUDA_VISIBLE_DEVICES='$CUDA_VISIBLE_DEVICES'"
        return
    fi
    if ! command -v nvidia-smi >/dev/null; then
        # Some containers have a GPU all the same, so none is hidden from PyTorch.
        no_gpu "nvidia-smi is not here" "找不到 nvidia-smi"
        return
    fi
    # A driver in trouble can make it hang.
    if ! list=$(timeout 30 nvidia-smi --query-gpu=index,memory.free,name --format=csv,noheader,nounits 2>&1); then
        no_gpu "nvidia-smi fails: ${list%%$'\n'*}" "nvidia-smi 执行失败：${list%%$'\n'*}"
        export CUDA_VISIBLE_DEVICES='' # PyTorch would meet the same trouble, or hang
        return
    fi
    while IFS=, read -r index free name; do
        index=${index// /}
        free=${free//[^0-9]/} # "[N/A]" where GPU and host share one memory
        [[ $index =~ ^[0-9]+$ ]] || continue
        known+=" $index"
        if [[ $index == "$GPU_ID" || (-z $GPU_ID && ${free:-0} -gt $chosen_free) ]]; then
            chosen=$index chosen_free=${free:-0} chosen_name=${name# }
        fi
    done <<<"$list"
    if [[ -z $known ]]; then
        no_gpu "nvidia-smi lists none" "nvidia-smi 没有列出 GPU"
        return
    fi
    [[ -n $chosen ]] || fail "There is no GPU_ID '$GPU_ID'; nvidia-smi lists:$known" "没有 GPU_ID '$GPU_ID'；nvidia-smi 列出：$known"
    export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=$chosen # numbered as nvidia-smi does
    if [[ -n $GPU_ID ]]; then
        say "GPU: $chosen ($chosen_name), as asked for; $chosen_free MiB free" "GPU：按指定使用 $chosen（$chosen_name），空闲 $chosen_free MiB"
    else
        say "GPU: $chosen ($chosen_name) has the most free memory, $chosen_free MiB, of:$known" \
            "GPU：$chosen（$chosen_name）空闲显存最多，$chosen_free MiB；共有：$known"
    fi
}

no_gpu() {
    [[ -z $GPU_ID ]] || fail "GPU_ID is '$GPU_ID', but $1. Leave GPU_ID out to use the CPU" "GPU_ID 为 '$GPU_ID'，但 $2。不设置 GPU_ID 则使用 CPU"
    say "GPU: none ($1); the CPU is used" "GPU：无（$2），使用 CPU"
}

read_arguments "$@"
PROJECT_DIR=${PROJECT_DIR:-$here}
HOST=${HOST:-127.0.0.1}
PORT=${PORT:-7860}
GPU_ID=${GPU_ID:-}
GPU_IDLE_TIMEOUT=${GPU_IDLE_TIMEOUT:-600}
GPU_KEEP_WARM=${GPU_KEEP_WARM:-0}
MODEL_PATH=${MODEL_PATH:-}
STEP_AUDIO_ROOT=${STEP_AUDIO_ROOT:-}
VENV_DIR=${VENV_DIR:-$PROJECT_DIR/.venv}
check_settings

# The app is not given another working folder: relative paths among its arguments are the caller's.
command=("$VENV_DIR/bin/python" "$PROJECT_DIR/app.py" "${arguments[@]}" --server-name "$HOST" --server-port "$PORT"
    --gpu-idle-timeout "$GPU_IDLE_TIMEOUT" --gpu-keep-warm "$GPU_KEEP_WARM")
[[ -z $MODEL_PATH ]] || command+=(--model-path "$MODEL_PATH")
[[ -z $STEP_AUDIO_ROOT ]] || command+=(--step-audio-root "$STEP_AUDIO_ROOT")

python=$VENV_DIR/bin/python
"$python" -Ic '' 2>/dev/null || python=$(find_python)
check_port "$python" # before an install of minutes, and again after it
choose_gpu
if [[ $check == yes ]]; then
    plan_environment "$VENV_DIR" "$PROJECT_DIR/requirements.txt"
    say "Would run:$(printf ' %q' "${command[@]}")" "以上为将要执行的操作，未做任何改动"
    exit 0
fi
prepare_environment "$VENV_DIR" "$PROJECT_DIR/requirements.txt"
check_port "$VENV_DIR/bin/python"
say "Starting http://$HOST:$PORT" "正在启动 http://$HOST:$PORT"
exec "${command[@]}"
