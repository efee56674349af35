# Python and the project's environment, for the start script and for the scripts beside this file: source it.
# shellcheck shell=bash

# In an environment made here: a copy of each requirements file that was installed completely, and the lock.
# An environment without it belongs to somebody else; nothing is ever changed there.
readonly MARK=.gpu-managed-tts

# Seconds between two words on an install that goes on silently: in a log, and in a terminal, where one line is rewritten.
readonly TELL_EVERY_S=10 REWRITE_EVERY_S=1

# Messages are in the language of the locale.
case ${LC_ALL:-${LC_MESSAGES:-${LANG:-}}} in
    zh*) readonly SPEAKS=zh ;;
    *) readonly SPEAKS=en ;;
esac

# in_words ENGLISH CHINESE: one of them, without the end of a line.
in_words() { if [[ $SPEAKS == zh ]]; then printf '%s' "$2"; else printf '%s' "$1"; fi; }

say() { in_words "$1"$'\n' "$2"$'\n'; }

fail() {
    say "❌ $1" "❌ $2" >&2
    exit 1
}

# A link may point to what is not made yet.
resolved() { readlink -f "$1" 2>/dev/null || echo "$1"; }

# Prints the first Python that is new enough and can make an environment.
find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -Ic 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "No Python 3.10 or newer with the venv module. On Debian and Ubuntu: sudo apt-get install python3 python3-venv" \
        "找不到带 venv 模块的 Python 3.10 或更高版本。Debian / Ubuntu 请执行：sudo apt-get install python3 python3-venv"
}

# environment_state VENV REQUIREMENTS...: prints absent, broken, outdated, ready, foreign (somebody else's environment)
# or taken (no environment at all).
environment_state() {
    local venv=$1 file
    shift
    if [[ ! -e $venv/$MARK ]]; then
        if [[ -x $venv/bin/python ]]; then
            echo foreign
        elif [[ -e $venv && -n $(ls -A "$venv") ]]; then
            echo taken
        else
            echo absent
        fi
        return
    fi
    # Also fails after the system's Python, which the environment points to, went from one version to the next.
    if ! "$venv/bin/python" -Ic 'import pip' 2>/dev/null; then
        echo broken
        return
    fi
    for file; do
        if ! cmp -s "$file" "$venv/$MARK/${file##*/}"; then
            echo outdated
            return
        fi
    done
    echo ready
}

# plan_environment VENV REQUIREMENTS...: says what prepare_environment would do; ends the script if it can do nothing.
plan_environment() {
    local venv=$1 python
    case $(environment_state "$@") in
        ready) say "Environment: $venv is ready" "环境：$venv 已就绪" ;;
        outdated) say "Environment: $venv needs an install" "环境：$venv 需要安装依赖" ;;
        absent)
            python=$(find_python)
            say "Environment: $venv is made with $python, then filled" "环境：用 $python 创建 $venv 并安装依赖"
            ;;
        broken)
            python=$(find_python)
            say "Environment: $venv is incomplete; it is made again with $python" "环境：$venv 不完整，用 $python 重建"
            ;;
        foreign)
            say "Environment: $venv was not made by this project; it is used as it is" "环境：$venv 不是本项目创建的，按原样使用"
            check_foreign "$@"
            ;;
        taken)
            fail "$venv exists and is no Python environment. Give another folder with VENV_DIR" \
                "$venv 已存在但不是 Python 环境。请用 VENV_DIR 指定其他目录"
            ;;
    esac
}

# prepare_environment VENV REQUIREMENTS...: makes, repairs or completes the environment; quick when there is nothing to do.
prepare_environment() {
    local venv=$1
    plan_environment "$@"
    case $(environment_state "$@") in
        ready | foreign) return ;;
    esac
    venv=$(resolved "$venv")
    set -- "$venv" "${@:2}"
    mkdir -p "$venv/$MARK" 2>/dev/null || fail "$venv cannot be made: give a folder that can be written with VENV_DIR" "无法创建 $venv：请用 VENV_DIR 指定可写的目录"
    (
        # One start at a time; where there is no flock (macOS) people take care themselves.
        if command -v flock >/dev/null && ! flock --nonblock 9; then
            say "Another start is setting up $venv; waiting for it" "另一个启动进程正在准备 $venv，等待其完成"
            flock 9
        fi
        complete_environment "$@"
    ) 9>"$venv/$MARK/lock"
}

# Under the lock. Looks again, because another start may have done the work meanwhile.
complete_environment() {
    local venv=$1 python file copy
    shift
    if [[ $(environment_state "$venv" "$@") == broken ]]; then
        python=$(find_python)
        find "$venv" -mindepth 1 -maxdepth 1 ! -name "$MARK" -exec rm -rf {} +
        rm -f "$venv/$MARK"/*.txt
        "$python" -m venv "$venv" || fail "$python could not make $venv (see above)" "$python 无法创建 $venv（见上）"
    fi
    for file; do
        copy=$venv/$MARK/${file##*/}
        if ! cmp -s "$file" "$copy"; then
            rm -f "$copy"
            install_requirements "$venv" "$file"
            cp "$file" "$copy"
        fi
    done
}

install_requirements() {
    local venv=$1 file=$2 torch
    local pip=("$venv/bin/python" -m pip install --no-input --disable-pip-version-check)
    say "Installing $file" "正在安装 $file"
    torch=$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' "$file")
    # PyTorch first and alone, so that the index of its builds serves nothing else.
    if [[ -n $torch ]]; then
        watched "$torch" "$venv" "${pip[@]}" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$torch" || install_failed "$torch"
    fi
    watched "$file" "$venv" "${pip[@]}" -r "$file" || install_failed "$file"
}

# The requirements of the package and of all its extras, with their ranges; extras that name others name nothing new.
package_ranges() { sed -n '/^dependencies = \[/,/^\[project.urls\]/s/^ *"\(.*\)",$/\1/p' pyproject.toml | grep -v '\[' | sort -u; }

# watched WHAT VENV COMMAND...: the install, and while it says nothing, how long it has gone on and what it has on the disk so
# far: in the environment, and in a folder of its own for what it fetches. Its exit status is the command's.
watched() (
    what=$1 venv=$2 every=$TELL_EVERY_S before='' after=$'\n' part='' began=$SECONDS
    shift 2
    [[ ! -t 1 ]] || every=$REWRITE_EVERY_S before=$'\r\e[K' after=''
    TMPDIR=$(mktemp -d)
    export TMPDIR
    trap 'rm -rf "$TMPDIR"' EXIT
    exec 7< <("$@" 2>&1)
    pid=$!
    while :; do
        code=0
        IFS= read -r -t "$every" -u 7 line || code=$?
        part+=$line
        if ((code > 128)); then
            # Files come and go meanwhile.
            size=$(du -smc "$venv" "$TMPDIR" 2>/dev/null | tail -n 1 | cut -f 1) || true
            printf '%s%s%s' "$before" "$(in_words "Installing $what: $((SECONDS - began)) s, $size MB on the disk" \
                "正在安装 $what：$((SECONDS - began)) 秒，磁盘占用 $size MB")" "$after"
        elif ((code)); then
            break
        else
            printf '%s%s\n' "$before" "$part"
            part=''
        fi
    done
    printf '%s%s' "$before" "$part"
    wait "$pid"
)

install_failed() {
    fail "$1 could not be installed (pip says why above). Check the network and the disk space, or name a mirror with PIP_INDEX_URL (PyTorch's with TORCH_INDEX_URL); then run this again, it goes on from here" \
        "$1 安装失败（原因见上方 pip 输出）。请检查网络与磁盘空间，或用 PIP_INDEX_URL 指定镜像（PyTorch 用 TORCH_INDEX_URL），然后重新运行，会从中断处继续"
}

# check_foreign VENV REQUIREMENTS...: names the packages that somebody else's environment lacks.
check_foreign() {
    local venv=$1 missing
    missing=$(
        "$venv/bin/python" -I - "${@:2}" <<'PYTHON'
import re
import sys
from importlib.metadata import PackageNotFoundError, version


def installed(name):
    for known_as in (name, name + "-gpu"):  # onnxruntime-gpu has the modules of onnxruntime
        try:
            return version(known_as)
        except PackageNotFoundError:
            pass


names = {}
for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as lines:
        names.update((match[0], None) for match in map(re.compile(r"[A-Za-z0-9][\w.-]*").match, lines) if match)
print(*(name for name in names if not installed(name)))
PYTHON
    ) || fail "$venv/bin/python does not run (see above)" "$venv/bin/python 无法运行（见上）"
    case " $missing " in
        *" torch "* | *" gradio "*)
            fail "$venv lacks $missing. Install them there, or leave VENV_DIR out and an environment is made for you" \
                "$venv 缺少 $missing。请在其中安装，或不设置 VENV_DIR 以自动创建环境"
            ;;
        "  ") ;;
        *) say "⚠️  $venv lacks $missing; what needs them will not work" "⚠️  $venv 缺少 $missing，相关功能不可用" ;;
    esac
}
