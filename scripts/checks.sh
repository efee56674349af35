# What the start script looks at before it starts anything: models, disk, port; GPU and driver are in gpu.sh. Needs environment.sh.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154 # the settings are those of the script that sources this

#: Disk that the first install takes, in MB: with the CUDA libraries that come with torch, and without.
readonly DISK_CUDA=9000 DISK_CPU=3000

# The folder with the weights. A hub's id is no folder; then the app fetches them. What is one, app.py decides as well.
check_models() {
    local part missing='' source=auto
    [[ ! " ${arguments[*]} " =~ \ --model-source[=\ ]([a-z]+)\  ]] || source=${BASH_REMATCH[1]}
    [[ -n $MODEL_PATH && $source != huggingface && $source != modelscope ]] || return 0
    if [[ $source == auto && ! -e $MODEL_PATH && $MODEL_PATH =~ ^[A-Za-z0-9][A-Za-z0-9_.-]*$ ]]; then
        say "$(named MODEL_PATH) is no folder here, so it is taken as the id of a hub" "此处没有目录 $(named MODEL_PATH)，按模型仓库 ID 处理"
        return
    fi
    [[ -d $MODEL_PATH && -r $MODEL_PATH && -x $MODEL_PATH ]] ||
        fail "$(named MODEL_PATH) is no folder that can be read: give the one with the weights, or leave it out for the built-in engine" \
            "$(named MODEL_PATH) 不是可读的目录：请指向权重目录，或不设置以使用内置引擎"
    for part in Step-Audio-Tokenizer Step-Audio-EditX; do
        compgen -G "$MODEL_PATH/$part*" >/dev/null || missing+=" $part"
    done
    [[ -z $missing ]] || say "⚠️  $(named MODEL_PATH) has no$missing: requests will say how to get it" \
        "⚠️  $(named MODEL_PATH) 中没有$missing：收到请求时会提示如何获取"
}

# What an install takes, in MB.
size_of_environment() { if [[ ${TORCH_INDEX_URL:-} == */cpu* ]]; then echo "$DISK_CPU"; else echo "$DISK_CUDA"; fi; }

# check_writable SETTING: the folder, or what it will be made in.
check_writable() {
    local folder
    folder=$(resolved "${!1}")
    while [[ ! -e $folder && ! -L $folder ]]; do folder=$(dirname "$folder"); done
    [[ -d $folder && -w $folder ]] ||
        fail "$(named "$1") cannot be written: give a folder that can be" "$(named "$1") 不可写：请指向可写的目录"
}

# The log and the record need a disk that is not full.
check_run_dir() {
    check_writable RUN_DIR
    [[ $check == no ]] || return 0
    # A name of its own, since another start may look at the same moment.
    (mkdir -p "$RUN_DIR" && try=$(mktemp "$RUN_DIR/$PORT.XXXXXXXX.try") && trap 'rm -f "$try"' EXIT && echo >"$try") ||
        fail "$(named RUN_DIR) cannot be written (see above): free space, or give another folder" \
            "$(named RUN_DIR) 无法写入（见上）：请清理空间，或换一个目录"
}

# The folder that --tmp-dir names.
check_tmp_dir() {
    local index TMP_DIR=''
    for index in "${!arguments[@]}"; do
        case ${arguments[index]} in
            --tmp-dir) TMP_DIR=${arguments[index + 1]:-} ;;
            --tmp-dir=*) TMP_DIR=${arguments[index]#*=} ;;
        esac
    done
    [[ -n $TMP_DIR ]] || return 0
    TMP_DIR=$(absolute "$TMP_DIR")
    check_writable TMP_DIR
}

# What app.py would say of its arguments, before anything is installed, or stopped for another start. They are read by its own
# module, which needs nothing but Python.
check_arguments() {
    local python=$VENV_DIR/bin/python said passed
    [[ -f $PROJECT_DIR/residency/launch/settings.py ]] || return 0
    "$python" -Ic '' 2>/dev/null || python=python3
    "$python" -Ic 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || return 0
    app_arguments
    said=$("$python" -I -B - "$PROJECT_DIR" "$SPEAKS" "${passed[@]}" 2>&1 <<'PYTHON'
import sys

sys.path.insert(0, sys.argv.pop(1))
language = sys.argv.pop(1)
sys.argv[0] = "app.py"
from residency.errors import ResidencyError
from residency.launch.settings import parse

ResidencyError.__str__ = lambda error: getattr(error, language)
parse(sys.argv[1:])
PYTHON
    ) || fail "${said##*app.py: error: } (app.py --help tells them all)" "参数有误：${said##*app.py: error: }（全部参数见 app.py --help）"
}

# check_disk FOLDER MB WHAT_EN WHAT_ZH: whether there is room for something where the folder is, or will be.
check_disk() {
    local folder free
    folder=$(resolved "$1")
    while [[ ! -e $folder ]]; do folder=$(dirname "$folder"); done
    free=$(df -Pm "$folder" | awk 'END {print $4}')
    ((free >= $2)) || fail "$3 needs about $2 MB in $1, and there are $free MB. Free space, or choose another disk" \
        "$4 需要在 $1 中占用约 $2 MB，现有 $free MB。请清理空间或换一个磁盘"
}

# check_port PYTHON PORT: binds as the server will; with the port in use, says who holds it and which one is free.
check_port() {
    local python=$1 answer
    answer=$(
        "$python" -I - "$HOST" "$2" <<'PYTHON'
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
        busy*) port_in_use "${answer#busy }" ;;
        refused*) cannot_listen "${answer#refused }" ;;
    esac
}

# cannot_listen WHY
cannot_listen() {
    fail "Cannot listen on $(named HOST), PORT $PORT: $1. Give an address of this machine (--host 127.0.0.1) and a port above 1023" \
        "无法监听 $(named HOST) PORT $PORT：$1。请使用本机地址（--host 127.0.0.1）和大于 1023 的端口"
}

# What a container without rights can listen on, on the host's network. Its port may be held by the one that it replaces.
check_port_of_container() {
    local lowest=1024
    [[ ! -r /proc/sys/net/ipv4/ip_unprivileged_port_start ]] || lowest=$(</proc/sys/net/ipv4/ip_unprivileged_port_start)
    ((PORT >= lowest)) || cannot_listen "$(in_words "the container has no rights to a port below $lowest" "容器无权使用低于 $lowest 的端口")"
    ! python3 -Ic '' 2>/dev/null || check_port python3 0
}

# port_in_use OTHER: OTHER is a port to take instead.
port_in_use() {
    local pid command=''
    pid=$(holders_of_port | head -n 1)
    [[ -z $pid ]] || command=$(ps -o args= -p "$pid" 2>/dev/null | cut -c 1-80) || true # no ps, or it has just ended
    fail "Port $PORT on $HOST is in use${pid:+ by pid $pid: $command}. Stop that program or choose another port: --port $1" \
        "$HOST 的端口 $PORT 已被占用${pid:+（进程 $pid：$command）}。请停止占用它的程序，或换一个端口：--port $1"
}

# The processes that listen on the port, as far as this user may know.
holders_of_port() {
    local pids
    pids=$(ss -Hltnp "sport = :$PORT" 2>/dev/null | grep -o 'pid=[0-9]*' | cut -c 5- | sort -u) || true
    echo "${pids:-$(lsof -nP -t -iTCP:"$PORT" -sTCP:LISTEN 2>/dev/null || true)}"
}
