#!/usr/bin/env bash
# Runs the app with GPU management on a machine that has nothing but Python, or Docker: `--help` tells the settings.
set -euo pipefail

here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
# shellcheck source=scripts/environment.sh
source "$here/scripts/environment.sh"
# shellcheck source=scripts/help.sh
source "$here/scripts/help.sh"
# shellcheck source=scripts/gpu.sh
source "$here/scripts/gpu.sh"
# shellcheck source=scripts/checks.sh
source "$here/scripts/checks.sh"
# shellcheck source=scripts/records.sh
source "$here/scripts/records.sh"
# shellcheck source=scripts/find.sh
source "$here/scripts/find.sh"
# shellcheck source=scripts/service.sh
source "$here/scripts/service.sh"
# shellcheck source=scripts/restart.sh
source "$here/scripts/restart.sh"
# shellcheck source=scripts/container_run.sh
source "$here/scripts/container_run.sh"
# shellcheck source=scripts/container.sh
source "$here/scripts/container.sh"

readonly SETTINGS=(HOST PORT GPU_ID GPU_IDLE_TIMEOUT GPU_KEEP_WARM GPU_SNAPSHOT_DIR MODEL_PATH STEP_AUDIO_ROOT PROJECT_DIR
    VENV_DIR RUN_DIR DOCKER DETACH REPLACE FOLLOW CONTAINER_NAME IMAGE BASE_IMAGE READY_TIMEOUT STOP_TIMEOUT)
readonly SWITCHES=(DOCKER DETACH REPLACE FOLLOW)
# Variables of app.py itself; a container gets them too.
readonly OF_APP=(GPU_CONTROL_TOKEN GRADIO_AUTH GPU_TTS_ROOT_PATH GRADIO_ROOT_PATH GPU_TTS_ALLOWED_HOSTS)
# Variables that keep their names: also those of CUDA and of scripts/environment.sh.
readonly PUBLIC=("${OF_APP[@]}" CUDA_VISIBLE_DEVICES TORCH_INDEX_URL)
# What the next `restart` takes from this start, besides the arguments of app.py.
readonly REMEMBERED=(HOST GPU_ID GPU_IDLE_TIMEOUT GPU_KEEP_WARM GPU_SNAPSHOT_DIR MODEL_PATH STEP_AUDIO_ROOT PROJECT_DIR VENV_DIR
    DETACH "${PUBLIC[@]}")

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
            given[$setting]=1 source_of[$setting]=$1
        elif [[ $1 == *=* ]]; then
            given[$setting]=${1#*=} source_of[$setting]=${1%%=*}
        else
            [[ $# -gt 1 && $2 != --* ]] || fail "$1 needs a value" "$1 需要一个值"
            given[$setting]=$2 source_of[$setting]=$1
            shift
        fi
        shift
    done
    is_one_of "$action" start restart || ((${#arguments[@]} == 0)) ||
        fail "$action does not know ${arguments[0]}; see --help" "$action 不支持 ${arguments[0]}；参见 --help"
    [[ $check == no || $action == start ]] || fail "--check goes with start" "--check 仅用于 start"
}

# Sets in_environment[SETTING] and source_of[SETTING], of what is no flag: what the variables say.
read_variables() {
    local name prefixed
    for name in "${SETTINGS[@]}"; do
        prefixed=GPU_TTS_$name
        if [[ -n ${given[$name]+set} ]]; then
            continue
        elif [[ -n ${!prefixed:-} ]]; then
            in_environment[$name]=${!prefixed} source_of[$name]=$prefixed
        elif [[ -n ${!name:-} ]] && is_for_us "$name"; then
            in_environment[$name]=${!name} source_of[$name]=$name
        fi
    done
    for name in "${PUBLIC[@]}"; do in_environment[$name]=${!name:-}; done
    others_host=${HOST:-}
}

# is_for_us SETTING: whether the variable without the prefix is this script's. Others set two of them: HOST is the name of the
# machine in some shells and its kind in conda's compilers, so only an address counts; CONTAINER_NAME is that of a sandbox,
# so it counts where a container is asked for.
is_for_us() {
    local address='^(localhost|[0-9.]+|\[?[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*\]?)$'
    case $1 in
        HOST) [[ $HOST =~ $address ]] ;;
        CONTAINER_NAME) [[ ${given[DOCKER]:-${in_environment[DOCKER]:-}} == 1 ]] ;;
    esac
}

# Tells users what became of a HOST or CONTAINER_NAME in their environment.
tell_of_strangers() {
    if [[ -n $others_host && -z ${in_environment[HOST]:-}${given[HOST]:-} ]]; then
        say "The variable HOST ('$others_host') is not read: it is no address, and shells and compilers set it. To listen there: --host or GPU_TTS_HOST" \
            "未采用环境变量 HOST（'$others_host'）：它不是地址，且常由 shell 和编译器设置。如需在该处监听，请用 --host 或 GPU_TTS_HOST"
    fi
    if [[ ${source_of[CONTAINER_NAME]:-} == CONTAINER_NAME ]]; then
        say "The container is called '$CONTAINER_NAME', as the variable CONTAINER_NAME says. Another name: --container-name or GPU_TTS_CONTAINER_NAME" \
            "容器名为 '$CONTAINER_NAME'，来自环境变量 CONTAINER_NAME。如需其他名字，请用 --container-name 或 GPU_TTS_CONTAINER_NAME"
    fi
}

# settle SETTING [DEFAULT]: from the flag, else the environment, else what the last start had; source_of[SETTING] tells which.
# Without any of them and without a default it stays unset.
settle() {
    local name=$1
    if [[ -n ${given[$name]+set} ]]; then
        printf -v "$name" '%s' "${given[$name]:-${2:-}}"
    elif [[ -n ${in_environment[$name]:-} ]]; then
        printf -v "$name" '%s' "${in_environment[$name]}"
    elif [[ -n ${remembered[$name]+set} ]]; then
        printf -v "$name" '%s' "${remembered[$name]}"
        source_of[$name]=remembered
    elif (($# > 1)); then
        printf -v "$name" '%s' "$2"
    fi
}

# named SETTING [VALUE]: as messages name it, with where its value is from.
named() {
    printf "%s '%s'" "$1" "${2-${!1}}"
    case ${source_of[$1]:-} in
        '') ;;
        -*) in_words " (${source_of[$1]})" "（${source_of[$1]}）" ;;
        remembered) in_words " (of the last start)" "（来自上次启动）" ;;
        *) in_words " (variable ${source_of[$1]})" "（环境变量 ${source_of[$1]}）" ;;
    esac
}

# Where something is, and where to find out what was started.
settle_identity() {
    settle PROJECT_DIR "$here"
    PROJECT_DIR=$(absolute "$PROJECT_DIR")
    settle RUN_DIR "$PROJECT_DIR/.run"
    RUN_DIR=$(absolute "$RUN_DIR")
    port_was_given=no name_was_given=no
    [[ -z ${given[PORT]:-}${in_environment[PORT]:-} ]] || port_was_given=yes
    [[ ${source_of[CONTAINER_NAME]:-CONTAINER_NAME} == CONTAINER_NAME ]] || name_was_given=yes
    settle PORT 7860
    settle DOCKER 0
    settle CONTAINER_NAME step-audio-gpu-managed
    settle READY_TIMEOUT 300
    settle STOP_TIMEOUT 60
    settle REPLACE 0
    settle FOLLOW 0
    local name
    if [[ ! $PORT =~ ^[1-9][0-9]{0,4}$ ]] || ((PORT > 65535)); then
        fail "$(named PORT) is no port: give 1 to 65535" "$(named PORT) 不是有效端口：请写 1 到 65535"
    fi
    for name in READY_TIMEOUT STOP_TIMEOUT; do
        [[ ${!name} =~ ^[1-9][0-9]{0,6}$ ]] ||
            fail "$(named "$name") is no number of seconds: give 1 or more" "$(named "$name") 不是秒数：请写 1 或更大的整数"
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
    settle DETACH 0
    check_switch DETACH
    for name in "${PUBLIC[@]}"; do
        settle "$name"
        [[ -z ${!name+set} ]] || export "${name?}"
    done
}

# A folder is meant from where this is called. A restart goes on in another one, and a container knows whole names only.
settle_folders() {
    local name
    for name in GPU_SNAPSHOT_DIR STEP_AUDIO_ROOT VENV_DIR MODEL_PATH; do
        [[ -z ${given[$name]:-} ]] || given[$name]=$(folder_of "$name" "${given[$name]}")
        [[ -z ${in_environment[$name]:-} ]] || in_environment[$name]=$(folder_of "$name" "${in_environment[$name]}")
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

check_switch() { [[ ${!1} =~ ^[01]$ ]] || fail "$(named "$1") is neither 1 nor 0" "$(named "$1") 应为 1 或 0"; }

# Before a start, and before what runs is stopped for another one.
check_settings() {
    local duration='[0-9]+(\.[0-9]+)?[smh]?'
    [[ $GPU_IDLE_TIMEOUT =~ ^(-1|$duration)$ ]] ||
        fail "$(named GPU_IDLE_TIMEOUT) is no duration: give seconds or 90s, 15m, 1h; -1 is never" \
            "$(named GPU_IDLE_TIMEOUT) 不是有效时长：请写秒数或 90s、15m、1h；-1 表示永不"
    [[ $GPU_KEEP_WARM =~ ^(-1|auto|$duration)$ ]] ||
        fail "$(named GPU_KEEP_WARM) is no duration: give seconds or 90s, 15m, 1h, -1 (for ever) or auto" \
            "$(named GPU_KEEP_WARM) 不是有效时长：请写秒数或 90s、15m、1h、-1（一直保留）或 auto"
    [[ -f $PROJECT_DIR/app.py && -f $PROJECT_DIR/requirements.txt ]] ||
        fail "$(named PROJECT_DIR) has no app.py and requirements.txt: give this project's folder" \
            "$(named PROJECT_DIR) 中没有 app.py 和 requirements.txt：请指向本项目目录"
    [[ -z $STEP_AUDIO_ROOT || -d $STEP_AUDIO_ROOT ]] ||
        fail "$(named STEP_AUDIO_ROOT) is no folder: give a checkout of Step-Audio-EditX" \
            "$(named STEP_AUDIO_ROOT) 不是目录：请指向 Step-Audio-EditX 的代码目录"
    [[ -z $STEP_AUDIO_ROOT || -f $STEP_AUDIO_ROOT/tts.py ]] ||
        say "⚠️  $(named STEP_AUDIO_ROOT) has no tts.py: it is no checkout of Step-Audio-EditX" \
            "⚠️  $(named STEP_AUDIO_ROOT) 中没有 tts.py，不是 Step-Audio-EditX 的代码目录"
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

declare -A given=() in_environment=() remembered=() source_of=()
read_arguments "$@"
read_variables
settle_folders
settle_identity
[[ $action == start ]] || find_app
kind=$(kind_of_app)
[[ $kind == container ]] || tell_of_damage
[[ $action == start ]] || "remember_$kind"
settle_rest
if is_one_of "$action" start restart; then
    note_settings
    tell_of_strangers
    check_settings
fi
"${action}_$kind"
