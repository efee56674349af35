#!/usr/bin/env bash
# Runs the app with GPU management on a machine that has nothing but Python, or Docker: `--help` tells the settings.
set -euo pipefail

here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
# shellcheck source=scripts/environment.sh
source "$here/scripts/environment.sh"
# shellcheck source=scripts/gpu.sh
source "$here/scripts/gpu.sh"
# shellcheck source=scripts/checks.sh
source "$here/scripts/checks.sh"
# shellcheck source=scripts/records.sh
source "$here/scripts/records.sh"
# shellcheck source=scripts/service.sh
source "$here/scripts/service.sh"
# shellcheck source=scripts/container_run.sh
source "$here/scripts/container_run.sh"
# shellcheck source=scripts/container.sh
source "$here/scripts/container.sh"

readonly SETTINGS=(HOST PORT GPU_ID GPU_IDLE_TIMEOUT GPU_KEEP_WARM GPU_SNAPSHOT_DIR MODEL_PATH STEP_AUDIO_ROOT PROJECT_DIR
    VENV_DIR RUN_DIR DOCKER DETACH REPLACE FOLLOW CONTAINER_NAME IMAGE BASE_IMAGE SOCKET_DIR READY_TIMEOUT STOP_TIMEOUT)
readonly SWITCHES=(DOCKER DETACH REPLACE FOLLOW)
# What the next `restart` takes from this start, besides the arguments of app.py.
readonly REMEMBERED=(HOST GPU_ID GPU_IDLE_TIMEOUT GPU_KEEP_WARM GPU_SNAPSHOT_DIR MODEL_PATH STEP_AUDIO_ROOT PROJECT_DIR VENV_DIR
    DETACH GPU_CONTROL_TOKEN GRADIO_AUTH CUDA_VISIBLE_DEVICES TORCH_INDEX_URL)

usage() {
    cat <<'EOF_USAGE'
Usage / 用法: start_with_gpu_management.sh [start|stop|restart|status|logs] [--name value]... [arguments of app.py]...

  start      the app, in this terminal or with --detach / 启动应用，在本终端或后台（--detach）
  stop       what start has started; a container that was replaced is back / 停止；被替换的容器恢复原名
  restart    with the settings of the last start; other ones may be given / 按上次的设置重启，可另给新设置
  status     where the app and its models are; 3 if it does not run / 应用与模型的状态；未运行时返回 3
  logs       the last lines; --follow goes on / 最后的日志；--follow 持续显示

A setting is a flag or an environment variable; the flag wins. Of DOCKER, DETACH, REPLACE and FOLLOW the variable is 1.
每项设置可用参数或环境变量给出，参数优先；DOCKER、DETACH、REPLACE、FOLLOW 的变量值为 1。

  --host              HOST              address to listen on / 监听地址 (127.0.0.1)
  --port              PORT              port / 端口 (7860)
  --gpu-id            GPU_ID            GPU as nvidia-smi numbers it, or none / 使用哪块 GPU 或 none (most free memory / 空闲显存最多的)
  --gpu-idle-timeout  GPU_IDLE_TIMEOUT  idle this long: released / 空闲多久后完全释放: 600, 90s, 15m, 1h, -1 (600)
  --gpu-keep-warm     GPU_KEEP_WARM     stay on the GPU this long after a request, or auto / 请求后在 GPU 上保留多久，或 auto (0)
  --gpu-snapshot-dir  GPU_SNAPSHOT_DIR  released weights are kept here / 已释放的权重保存在此 (none / 无)
  --model-path        MODEL_PATH        weights of Step-Audio-EditX / 模型权重目录 (none: built-in engine / 不设则用内置引擎)
  --step-audio-root   STEP_AUDIO_ROOT   checkout of Step-Audio-EditX / 其代码目录
  --project-dir       PROJECT_DIR       folder of app.py / app.py 所在目录 (this script's / 本脚本所在目录)
  --venv-dir          VENV_DIR          Python environment / Python 环境 (PROJECT_DIR/.venv); one that you made is never
                                        changed / 您自己创建的环境不会被改动
  --detach            DETACH            run in the background; returns once it is ready / 后台运行，就绪后返回
  --run-dir           RUN_DIR           log and pid of what runs / 日志与进程号 (PROJECT_DIR/.run)
  --ready-timeout     READY_TIMEOUT     wait this many seconds for it / 等待就绪的秒数 (300)
  --stop-timeout      STOP_TIMEOUT      wait this many seconds for its end / 等待退出的秒数 (60)
  --check                               say what would be done, do nothing / 只说明将做什么，不执行
  --help                                this text; the arguments of app.py (--simulate-gpu, --auth, --max-upload ...) are told
                                        by `python app.py --help` / 显示本说明；app.py 自己的参数见 python app.py --help

  --docker            DOCKER            in a container / 在容器中运行
  --container-name    CONTAINER_NAME    its name / 容器名 (step-audio-gpu-managed)
  --replace           REPLACE           put it in the place of one of that name / 替换同名容器
  --image             IMAGE             name of the image / 镜像名 (gpu-managed-tts)
  --base-image        BASE_IMAGE        what it is built on; the image of a Step-Audio-EditX checkout for the real engine /
                                        基础镜像；真实引擎请用 Step-Audio-EditX 的镜像 (python:3.11-slim-bookworm)
  --socket-dir        SOCKET_DIR        folder for sockets between services, not used yet / 服务间套接字目录，尚未使用
                                        (/tmp/gpu-managed-tts)

pip's own variables work as usual; while an image is built, PIP_INDEX_URL and PIP_EXTRA_INDEX_URL do. TORCH_INDEX_URL is where
PyTorch alone comes from: without a GPU, https://download.pytorch.org/whl/cpu saves several GB.
pip 的环境变量照常生效；构建镜像时，其中 PIP_INDEX_URL 和 PIP_EXTRA_INDEX_URL 有效。TORCH_INDEX_URL 仅用于 PyTorch：没有 GPU 时设为 https://download.pytorch.org/whl/cpu 可少下载数 GB。
EOF_USAGE
}

# is_one_of WORD WORDS...
is_one_of() {
    local word=$1 other
    shift
    for other; do
        [[ $word != "$other" ]] || return 0
    done
    return 1
}

# setting_of ARGUMENT: prints the setting that a flag is for; fails if it is none of this script's.
setting_of() {
    local name=${1%%=*}
    case $name in
        --server-name) name=HOST ;; # as app.py calls them
        --server-port) name=PORT ;;
        --*) name=${name#--} name=${name^^} name=${name//-/_} ;;
    esac
    is_one_of "$name" "${SETTINGS[@]}" && echo "$name"
}

# Sets action, check, given[SETTING]; everything that is no setting of this script goes on to app.py (arguments).
read_arguments() {
    local setting
    action=start check=no arguments=()
    if [[ ${1:-} == [!-]* ]]; then
        is_one_of "$1" start stop restart status logs ||
            fail "There is no action '$1': start, stop, restart, status, logs; see --help" "没有操作 '$1'：可用 start、stop、restart、status、logs；参见 --help"
        action=$1
        shift
    fi
    while (($#)); do
        if [[ $1 == --check ]]; then
            check=yes
        elif is_one_of "$1" --help -h; then
            usage
            exit 0
        elif ! setting=$(setting_of "$1"); then
            arguments+=("$1")
        elif is_one_of "$setting" "${SWITCHES[@]}"; then
            [[ $1 != *=* ]] || fail "${1%%=*} takes no value" "${1%%=*} 不带值"
            given[$setting]=1
        elif [[ $1 == *=* ]]; then
            given[$setting]=${1#*=}
        else
            [[ $# -gt 1 && $2 != --* ]] || fail "$1 needs a value" "$1 需要一个值"
            given[$setting]=$2
            shift
        fi
        shift
    done
    is_one_of "$action" start restart || ((${#arguments[@]} == 0)) ||
        fail "$action does not know ${arguments[0]}; see --help" "$action 不支持 ${arguments[0]}；参见 --help"
    [[ $check == no || $action == start ]] || fail "--check goes with start" "--check 仅用于 start"
}

# settle SETTING [DEFAULT]: from the flag, else the environment, else what the last start had. Without any of them and
# without a default it stays unset.
settle() {
    local name=$1
    if [[ -n ${given[$name]+set} ]]; then
        printf -v "$name" '%s' "${given[$name]:-${2:-}}"
    elif [[ -z ${!name:-} && -n ${remembered[$name]+set} ]]; then
        printf -v "$name" '%s' "${remembered[$name]}"
    elif (($# > 1)); then
        printf -v "$name" '%s' "${!name:-$2}"
    fi
}

# Where something is, and where to find out what was started.
settle_identity() {
    settle PROJECT_DIR "$here"
    PROJECT_DIR=$(absolute "$PROJECT_DIR")
    settle RUN_DIR "$PROJECT_DIR/.run"
    RUN_DIR=$(absolute "$RUN_DIR")
    port_was_given=no
    [[ -z ${given[PORT]:-}${PORT:-} ]] || port_was_given=yes
    settle PORT 7860
    settle DOCKER 0
    settle CONTAINER_NAME step-audio-gpu-managed
    settle READY_TIMEOUT 300
    settle STOP_TIMEOUT 60
    settle REPLACE 0
    settle FOLLOW 0
    local name
    if [[ ! $PORT =~ ^[1-9][0-9]{0,4}$ ]] || ((PORT > 65535)); then
        fail "PORT '$PORT' is no port: give 1 to 65535" "PORT '$PORT' 不是有效端口：请写 1 到 65535"
    fi
    for name in READY_TIMEOUT STOP_TIMEOUT; do
        [[ ${!name} =~ ^[1-9][0-9]{0,6}$ ]] ||
            fail "$name '${!name}' is no number of seconds: give 1 or more" "$name '${!name}' 不是秒数：请写 1 或更大的整数"
    done
    for name in DOCKER REPLACE FOLLOW; do check_switch "$name"; done
}

settle_rest() {
    local name
    settle HOST 127.0.0.1
    settle GPU_ID ''
    settle GPU_IDLE_TIMEOUT 600
    settle GPU_KEEP_WARM 0
    settle GPU_SNAPSHOT_DIR ''
    settle MODEL_PATH ''
    settle STEP_AUDIO_ROOT ''
    settle VENV_DIR "$PROJECT_DIR/.venv"
    settle IMAGE gpu-managed-tts
    settle BASE_IMAGE python:3.11-slim-bookworm
    settle SOCKET_DIR /tmp/gpu-managed-tts
    settle DETACH 0
    check_switch DETACH
    for name in GPU_CONTROL_TOKEN GRADIO_AUTH CUDA_VISIBLE_DEVICES TORCH_INDEX_URL; do
        settle "$name"
        [[ -z ${!name+set} ]] || export "${name?}"
    done
}

# A folder is meant from where this is called. A restart goes on in another one, and a container knows whole names only.
settle_folders() {
    local name
    for name in GPU_SNAPSHOT_DIR STEP_AUDIO_ROOT VENV_DIR SOCKET_DIR MODEL_PATH; do
        [[ -z ${given[$name]:-} ]] || given[$name]=$(folder_of "$name" "${given[$name]}")
        [[ -z ${!name:-} ]] || printf -v "$name" '%s' "$(folder_of "$name" "${!name}")"
    done
}

# folder_of SETTING VALUE. What is no folder may be the id of a hub.
folder_of() { if [[ $1 == MODEL_PATH && $2 != \~/* && ! -d $2 ]]; then echo "$2"; else absolute "$2"; fi; }

# In words that can be typed, whatever the language of the terminal.
quoted() { LC_ALL=C.UTF-8 printf ' %q' "$@"; }

# Also of ~/..., which the shell leaves as it is after a =.
absolute() {
    case $1 in
        /*) echo "$1" ;;
        \~/*) echo ~/"${1:2}" ;;
        *) echo "$PWD/$1" ;;
    esac
}

check_switch() { [[ ${!1} =~ ^[01]$ ]] || fail "$1 '${!1}' is neither 1 nor 0" "$1 '${!1}' 应为 1 或 0"; }

# Before a start, and before what runs is stopped for another one.
check_settings() {
    local duration='[0-9]+(\.[0-9]+)?[smh]?'
    [[ $GPU_IDLE_TIMEOUT =~ ^(-1|$duration)$ ]] ||
        fail "GPU_IDLE_TIMEOUT '$GPU_IDLE_TIMEOUT' is no duration: give seconds or 90s, 15m, 1h; -1 is never" \
            "GPU_IDLE_TIMEOUT '$GPU_IDLE_TIMEOUT' 不是有效时长：请写秒数或 90s、15m、1h；-1 表示永不"
    [[ $GPU_KEEP_WARM =~ ^(-1|auto|$duration)$ ]] ||
        fail "GPU_KEEP_WARM '$GPU_KEEP_WARM' is no duration: give seconds or 90s, 15m, 1h, -1 (for ever) or auto" \
            "GPU_KEEP_WARM '$GPU_KEEP_WARM' 不是有效时长：请写秒数或 90s、15m、1h、-1（一直保留）或 auto"
    [[ -f $PROJECT_DIR/app.py && -f $PROJECT_DIR/requirements.txt ]] ||
        fail "PROJECT_DIR '$PROJECT_DIR' has no app.py and requirements.txt: give this project's folder" \
            "PROJECT_DIR '$PROJECT_DIR' 中没有 app.py 和 requirements.txt：请指向本项目目录"
    [[ -z $STEP_AUDIO_ROOT || -d $STEP_AUDIO_ROOT ]] ||
        fail "STEP_AUDIO_ROOT '$STEP_AUDIO_ROOT' is no folder: give a checkout of Step-Audio-EditX" \
            "STEP_AUDIO_ROOT '$STEP_AUDIO_ROOT' 不是目录：请指向 Step-Audio-EditX 的代码目录"
    [[ -z $STEP_AUDIO_ROOT || -f $STEP_AUDIO_ROOT/tts.py ]] ||
        say "⚠️  STEP_AUDIO_ROOT '$STEP_AUDIO_ROOT' has no tts.py: it is no checkout of Step-Audio-EditX" \
            "STEP_AUDIO_ROOT '$STEP_AUDIO_ROOT' 中没有 tts.py，不是 Step-Audio-EditX 的代码目录"
    check_models
    [[ -z $GPU_SNAPSHOT_DIR ]] || check_writable GPU_SNAPSHOT_DIR
    check_tmp_dir
    check_arguments
}

# Sets passed: what app.py is called with.
app_arguments() {
    passed=(--enable-gpu-management "${arguments[@]}" --server-name "$HOST" --server-port "$PORT"
        --gpu-idle-timeout "$GPU_IDLE_TIMEOUT" --gpu-keep-warm "$GPU_KEEP_WARM")
    [[ -z $GPU_SNAPSHOT_DIR ]] || passed+=(--gpu-snapshot-dir "$GPU_SNAPSHOT_DIR")
    [[ -z $MODEL_PATH ]] || passed+=(--model-path "$MODEL_PATH")
    [[ -z $STEP_AUDIO_ROOT ]] || passed+=(--step-audio-root "$STEP_AUDIO_ROOT")
}

# A container if that is said; where something is to be found that runs, also if one serves that port and no process does.
kind_of_app() {
    local state=absent
    if [[ $DOCKER == 1 ]]; then
        echo container
        return
    fi
    if [[ $action != start ]] && ! { read_record && lives; } && command -v docker >/dev/null; then
        [[ $port_was_given == yes && $(label port) != "$PORT" ]] || state=$(container_state)
    fi
    # What is left of a process says more than what is left of a container.
    if [[ $state == "ours running" ]] || { [[ $state == ours* ]] && ! read_record; }; then echo container; else echo service; fi
}

declare -A given=() remembered=()
read_arguments "$@"
settle_folders
settle_identity
kind=$(kind_of_app)
[[ $kind == container ]] || tell_of_damage
[[ $action == start ]] || "remember_$kind"
settle_rest
if is_one_of "$action" start restart; then
    note_settings
    check_settings
fi
"${action}_$kind"
