# What the start script looks at before it starts anything: GPU, driver, models, disk, port. Needs environment.sh.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154 # the settings are those of the script that sources this

#: Major version of CUDA that a torch build has -> oldest driver for it (NVIDIA, CUDA Compatibility).
declare -rA OLDEST_DRIVER=([11]=450 [12]=525 [13]=580)
#: Disk that the first install takes, in MB: with the CUDA libraries that come with torch, and without.
readonly DISK_CUDA=9000 DISK_CPU=3000

# Finds the GPU: sets gpu (its number, or empty), driver, and CUDA_VISIBLE_DEVICES for what is started here.
choose_gpu() {
    local list index free name version chosen_free=-1 chosen_name='' known=''
    gpu='' driver=''
    if [[ $GPU_ID == none ]]; then
        export CUDA_VISIBLE_DEVICES=''
        say "GPU: none, as asked for; the CPU is used" "GPU：按要求不使用，使用 CPU"
        return
    fi
    if [[ -z $GPU_ID && -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        gpu=$CUDA_VISIBLE_DEVICES
        say "GPU: as CUDA_VISIBLE_DEVICES='$CUDA_VISIBLE_DEVICES' says" "GPU：按 CUDA_VISIBLE_DEVICES='$CUDA_VISIBLE_DEVICES'"
        return
    fi
    if ! command -v nvidia-smi >/dev/null; then
        # Some containers have a GPU all the same, so none is hidden from PyTorch.
        no_gpu "nvidia-smi is not here" "找不到 nvidia-smi"
        return
    fi
    # A driver in trouble can make it hang.
    if ! list=$(timeout 30 nvidia-smi --query-gpu=index,memory.free,driver_version,name --format=csv,noheader,nounits 2>&1); then
        no_gpu "nvidia-smi fails: ${list%%$'\n'*}" "nvidia-smi 执行失败：${list%%$'\n'*}"
        export CUDA_VISIBLE_DEVICES='' # PyTorch would meet the same trouble, or hang
        return
    fi
    while IFS=, read -r index free version name; do
        index=${index// /}
        free=${free//[^0-9]/} # "[N/A]" where GPU and host share one memory
        [[ $index =~ ^[0-9]+$ ]] || continue
        known+=" $index" driver=${version// /}
        if [[ $index == "$GPU_ID" || (-z $GPU_ID && ${free:-0} -gt $chosen_free) ]]; then
            gpu=$index chosen_free=${free:-0} chosen_name=${name# }
        fi
    done <<<"$list"
    if [[ -z $known ]]; then
        no_gpu "nvidia-smi lists none" "nvidia-smi 没有列出 GPU"
        return
    fi
    [[ -n $gpu ]] || fail "There is no GPU_ID '$GPU_ID'; nvidia-smi lists:$known" "没有 GPU_ID '$GPU_ID'；nvidia-smi 列出：$known"
    export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=$gpu # numbered as nvidia-smi does
    if [[ -n $GPU_ID ]]; then
        say "GPU: $gpu ($chosen_name), as asked for; $chosen_free MiB free" "GPU：按指定使用 $gpu（$chosen_name），空闲 $chosen_free MiB"
    else
        say "GPU: $gpu ($chosen_name) has the most free memory, $chosen_free MiB, of:$known" \
            "GPU：$gpu（$chosen_name）空闲显存最多，$chosen_free MiB；共有：$known"
    fi
}

no_gpu() {
    [[ -z $GPU_ID ]] || fail "GPU_ID is '$GPU_ID', but $1. Give GPU_ID=none to use the CPU" "GPU_ID 为 '$GPU_ID'，但$2。使用 CPU 请设 GPU_ID=none"
    say "GPU: none ($1); the CPU is used" "GPU：无（$2），使用 CPU"
}

# check_driver VERSION_PY WHERE: whether the driver is new enough for a torch, by the text of its version.py. Importing it takes seconds.
check_driver() {
    local cuda oldest
    [[ -n $driver && -n $1 ]] || return 0
    cuda=$(sed -n "s/^cuda[^=]*= *'\([0-9]*\).*/\1/p" <<<"$1")
    if [[ -z $cuda ]]; then
        say "⚠️  The torch in $2 is built without CUDA, so the GPU is not used. For one with it, remove $2 and start without TORCH_INDEX_URL" \
            "$2 中的 torch 不含 CUDA，不会使用 GPU。如需 GPU，请删除 $2，并在不设 TORCH_INDEX_URL 的情况下重新启动"
        return
    fi
    oldest=${OLDEST_DRIVER[$cuda]:-0}
    ((${driver%%.*} >= oldest)) ||
        fail "Driver $driver is too old for torch with CUDA $cuda, which needs $oldest or newer. Update the driver, take another build (remove $2; TORCH_INDEX_URL, see pytorch.org), or give GPU_ID=none" \
            "驱动 $driver 过旧：CUDA $cuda 的 torch 需要 $oldest 或更高版本。请更新驱动，或换用其他 torch（删除 $2，设置 TORCH_INDEX_URL，参见 pytorch.org），或设 GPU_ID=none"
}

# The folder with the weights. A hub's id is no folder; then the app fetches them.
check_models() {
    local part missing=''
    [[ -n $MODEL_PATH && " ${arguments[*]} " != *" --model-source"[=\ ]@(huggingface|modelscope)" "* ]] || return 0
    [[ -d $MODEL_PATH && -r $MODEL_PATH && -x $MODEL_PATH ]] ||
        fail "MODEL_PATH '$MODEL_PATH' is no folder that can be read: give the one with the weights, or leave it out for the built-in engine" \
            "MODEL_PATH '$MODEL_PATH' 不是可读的目录：请指向权重目录，或不设置以使用内置引擎"
    for part in Step-Audio-Tokenizer Step-Audio-EditX; do
        compgen -G "$MODEL_PATH/$part*" >/dev/null || missing+=" $part"
    done
    [[ -z $missing ]] || say "⚠️  MODEL_PATH '$MODEL_PATH' has no$missing: requests will say how to get it" \
        "MODEL_PATH '$MODEL_PATH' 中没有$missing：收到请求时会提示如何获取"
}

# What an install takes, in MB.
size_of_environment() { if [[ ${TORCH_INDEX_URL:-} == */cpu* ]]; then echo "$DISK_CPU"; else echo "$DISK_CUDA"; fi; }

# check_writable SETTING: the folder, or what it will be made in.
check_writable() {
    local folder=${!1}
    while [[ ! -e $folder ]]; do folder=$(dirname "$folder"); done
    [[ -d $folder && -w $folder ]] ||
        fail "$1 '${!1}' cannot be written: give a folder that can be" "$1 '${!1}' 不可写：请指向可写的目录"
}

# What app.py would say of its arguments, before anything is installed, or stopped for another start. They are read by its own
# module, which needs nothing but Python.
check_arguments() {
    local python=$VENV_DIR/bin/python said passed
    [[ -f $PROJECT_DIR/residency/settings.py ]] || return 0
    "$python" -Ic '' 2>/dev/null || python=python3
    "$python" -Ic 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || return 0
    app_arguments
    said=$("$python" -I -B - "$PROJECT_DIR" "${passed[@]}" 2>&1 <<'PYTHON'
import sys

sys.path.insert(0, sys.argv.pop(1))
sys.argv[0] = "app.py"
from residency.settings import parse

parse(sys.argv[1:])
PYTHON
    ) || fail "${said##*app.py: error: } (app.py --help tells them all)" "参数有误（全部参数见 app.py --help）"
}

# check_disk FOLDER MB WHAT_EN WHAT_ZH: whether there is room for something where the folder is, or will be.
check_disk() {
    local folder=$1 free
    while [[ ! -e $folder ]]; do folder=$(dirname "$folder"); done
    free=$(df -Pm "$folder" | awk 'END {print $4}')
    ((free >= $2)) || fail "$3 needs about $2 MB in $1, and there are $free MB. Free space, or choose another disk" \
        "$4 需要在 $1 中占用约 $2 MB，现有 $free MB。请清理空间或换一个磁盘"
}

# check_port PYTHON: binds as the server will; with the port in use, says who holds it and which one is free.
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
        busy*) port_in_use "${answer#busy }" ;;
        refused*)
            fail "Cannot listen on HOST '$HOST', PORT $PORT: ${answer#refused }. Give an address of this machine (--host 127.0.0.1) and a port above 1023" \
                "无法监听 HOST '$HOST' PORT $PORT：${answer#refused }。请使用本机地址（--host 127.0.0.1）和大于 1023 的端口"
            ;;
    esac
}

# port_in_use OTHER: OTHER is a port to take instead.
port_in_use() {
    local pid command=''
    pid=$(holder_of_port)
    [[ -z $pid ]] || command=$(ps -o args= -p "$pid" 2>/dev/null | cut -c 1-80)
    fail "Port $PORT on $HOST is in use${pid:+ by pid $pid: $command}. Stop that program or choose another port: --port $1" \
        "$HOST 的端口 $PORT 已被占用${pid:+（进程 $pid：$command）}。请停止占用它的程序，或换一个端口：--port $1"
}

holder_of_port() {
    local pid
    pid=$(ss -Hltnp "sport = :$PORT" 2>/dev/null | sed -n 's/.*pid=\([0-9]*\).*/\1/p' | sort -u) || true
    pid=${pid:-$(lsof -nP -t -iTCP:"$PORT" -sTCP:LISTEN 2>/dev/null)} || true
    echo "${pid%%$'\n'*}"
}
