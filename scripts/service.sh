# The app as a process of this machine: start, and from another terminal stop, status, restart, logs. Needs environment.sh.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154 # the settings are those of the script that sources this
#
# What runs is known by its port: RUN_DIR/PORT.pid has its pid, RUN_DIR/PORT.run what stop, status and restart need: pid, when that
# was born, log, folder, arguments and settings, NUL after each. The files are for their owner only: they may hold secrets.

# Where a browser finds it.
address() {
    local host
    host=$(reached_at)
    [[ $host != *:* ]] || host="[$host]"
    printf 'http://%s:%s' "$host" "$PORT"
}

# An address that reaches HOST from here.
reached_at() {
    case $HOST in
        0.0.0.0) echo 127.0.0.1 ;;
        :: | '[::]') echo ::1 ;;
        *) echo "$HOST" ;;
    esac
}

# Whether /readyz answers 200. Bash itself asks: a Python would take longer to start than the answer to come.
is_ready() {
    (
        exec 3<>"/dev/tcp/$(reached_at)/$PORT" || exit 1
        printf 'GET /readyz HTTP/1.0\r\nHost: %s:%s\r\n\r\n' "$(reached_at)" "$PORT" >&3
        IFS= read -r -t 5 answer <&3
        [[ $answer == HTTP/*' 200 '* ]]
    ) 2>/dev/null
}

# await_ready EVERY COMMAND...: wait until it is ready; 1 if COMMAND (is it alive?) says no, 2 after READY_TIMEOUT.
await_ready() {
    local every=$1 began=$SECONDS told=0
    shift
    until is_ready; do
        "$@" || return 1
        if ((SECONDS - began >= READY_TIMEOUT)); then
            return 2
        elif ((SECONDS - began >= told + 10)); then
            told=$((SECONDS - began))
            say "Still starting, $told s" "仍在启动，已 $told 秒"
        fi
        sleep "$every"
    done
}

# tell_ways LOG STOP [LOG_ZH STOP_ZH]: says where it is, and how to look into it and end it.
tell_ways() {
    say "✅ Ready: $(address)" "已就绪：$(address)"
    say "   Log: $1" "日志：${3:-$1}"
    say "   Stop: $2" "停止：${4:-$2}"
}

# this_script ACTION: how this script is called for the app that it has just started.
this_script() {
    printf '%s %s' "$(quoted "$0" | cut -c 2-)" "$1"
    [[ $kind == service ]] || printf ' --docker'
    [[ $CONTAINER_NAME == step-audio-gpu-managed || $kind == service ]] || quoted --container-name "$CONTAINER_NAME"
    [[ $PORT == 7860 || $kind == container ]] || printf ' --port %s' "$PORT"
    [[ $RUN_DIR == "$PROJECT_DIR/.run" || $kind == container ]] || quoted --run-dir "$RUN_DIR"
    [[ $PROJECT_DIR == "$here" ]] || quoted --project-dir "$PROJECT_DIR"
}

# -- what is known of it ------------------------------------------------------------------------------------------

# When a process was born, so that another one with its number is not taken for it; nothing if it has ended.
born() {
    local stat
    if [[ -r /proc/self/stat ]]; then
        stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
        read -ra stat <<<"${stat##*) }" # the name before that may have spaces
        [[ ${stat[0]} == Z ]] || echo "${stat[19]}"
    else
        ps -o lstart= -p "$1" 2>/dev/null || true
    fi
}

has_process() { [[ -n $(born "$1") ]]; }

record_file() { echo "$RUN_DIR/$PORT.run"; }
pid_file() { echo "$RUN_DIR/$PORT.pid"; }

# Sets to_remember: of the settings what a restart takes over, as they are before anything is chosen for the user.
note_settings() {
    local name
    to_remember=()
    for name in "${REMEMBERED[@]}"; do
        [[ -z ${!name+set} ]] || to_remember+=("$name" "${!name}")
    done
}

# write_record PID LOG
write_record() {
    local file
    file=$(record_file)
    (
        umask 077
        mkdir -p "$RUN_DIR" && { [[ ! -e $file ]] || mv "$file" "$file.last"; } &&
            printf '%s\0' "$1" "$(born "$1")" "$2" "$PWD" "${#arguments[@]}" "${arguments[@]}" "${to_remember[@]}" >"$file.new" &&
            mv "$file.new" "$file" && echo "$1" >"$(pid_file)"
    ) || say "⚠️  RUN_DIR '$RUN_DIR' cannot be written: stop, status and restart will not find this app" \
        "无法写入 RUN_DIR '$RUN_DIR'：stop、status、restart 将找不到本应用"
}

forget_record() { rm -f "$(record_file)" "$(record_file).last" "$(pid_file)"; }

# The start came to nothing: what counts for a restart is the one before, if there was one.
forget_start() {
    rm -f "$(pid_file)"
    [[ ! -e $(record_file).last ]] || mv "$(record_file).last" "$(record_file)"
}

has_record() { [[ -e $(record_file) ]]; }

# Sets pid, pid_born, log, started_in, remembered_arguments and remembered[SETTING]; fails if there is no record.
read_record() {
    local file record count index
    file=$(record_file)
    has_record || return 1
    # A restart runs what it says.
    [[ -O $file || $action != start ]] || return 1
    [[ -O $file ]] || fail "What runs on port $PORT was started by the user $(stat -c %U "$file"): be that user (sudo -u)" \
        "端口 $PORT 上的应用由用户 $(stat -c %U "$file") 启动：请以该用户身份执行（sudo -u）"
    mapfile -d '' -t record <"$file"
    pid=${record[0]} pid_born=${record[1]} log=${record[2]} started_in=${record[3]} count=${record[4]}
    remembered_arguments=("${record[@]:5:count}")
    for ((index = 5 + count; index < ${#record[@]}; index += 2)); do
        remembered["${record[index]}"]=${record[index + 1]}
    done
}

# Whether the process of the record is still that one, and not another one with its number.
lives() { [[ -n ${pid:-} && -n $pid_born && $(born "$pid") == "$pid_born" ]]; }

# For all that comes after a start: the settings are those of that, and arguments are added to it.
remember_service() {
    if ! read_record; then
        [[ $action != restart ]] ||
            say "Nothing is known of an earlier start on port $PORT: started with what is given now" "没有端口 $PORT 上次启动的设置：按现在给出的设置启动"
        return 0
    fi
    arguments=("${remembered_arguments[@]}" "${arguments[@]}")
    cd "$started_in" 2>/dev/null || [[ $action != restart ]] ||
        fail "The folder that it was started in is gone: $started_in" "启动时所在的目录已不存在：$started_in"
}

# -- start --------------------------------------------------------------------------------------------------------

refuse_second_start() {
    if read_record && lives; then
        fail "It runs already on port $PORT (pid $pid): $(address). Use restart or stop, or another --port" \
            "端口 $PORT 上已在运行（进程 $pid）：$(address)。请用 restart 或 stop，或换一个 --port"
    fi
}

# Of two starts at once, one waits here until the other's record is written.
lock_records() {
    if command -v flock >/dev/null && mkdir -p "$RUN_DIR" 2>/dev/null; then
        exec 8<"$RUN_DIR"
        flock 8
    fi
}

unlock_records() { exec 8<&-; }

start_service() {
    refuse_second_start
    local python=$VENV_DIR/bin/python command to_remember passed
    note_settings
    app_arguments
    command=("$python" "$PROJECT_DIR/app.py" "${passed[@]}")
    "$python" -Ic '' 2>/dev/null || python=$(find_python)
    check_port "$python" # before an install of minutes, and again after it
    choose_gpu
    check_install
    [[ $DETACH == 0 ]] || check_writable RUN_DIR
    if [[ $check == yes ]]; then
        plan_environment "$VENV_DIR" "$PROJECT_DIR/requirements.txt"
        check_driver "$(torch_of_environment)" "$VENV_DIR"
        tell_plan "${command[@]}"
        return
    fi
    prepare_environment "$VENV_DIR" "$PROJECT_DIR/requirements.txt"
    check_driver "$(torch_of_environment)" "$VENV_DIR"
    lock_records
    refuse_second_start
    check_port "$VENV_DIR/bin/python"
    say "Starting $(address)" "正在启动 $(address)"
    if [[ $DETACH == 1 ]]; then run_detached "${command[@]}"; else run_here "${command[@]}"; fi
}

# tell_plan COMMAND...
tell_plan() {
    say "Would run:$(quoted "$@")" "将执行上述命令"
    say "Would wait for $(address)/readyz, at most $READY_TIMEOUT s" "随后等待 $(address)/readyz，最多 $READY_TIMEOUT 秒"
    say "Nothing was changed" "未做任何改动"
}

torch_of_environment() { cat "$VENV_DIR"/lib/python3*/site-packages/torch/version.py 2>/dev/null || true; }

# The folder of an environment that is not ready yet must have room for it.
check_install() {
    case $(environment_state "$VENV_DIR" "$PROJECT_DIR/requirements.txt") in
        absent | broken)
            [[ -z $STEP_AUDIO_ROOT || $VENV_DIR != "$STEP_AUDIO_ROOT"/* ]] ||
                fail "There is no Python environment $VENV_DIR, and nothing is made in a checkout: make it as Step-Audio-EditX says, or leave VENV_DIR out" \
                    "没有 Python 环境 $VENV_DIR，且不会在代码目录中新建：请按 Step-Audio-EditX 的说明创建，或不设置 VENV_DIR"
            check_writable VENV_DIR
            check_disk "$VENV_DIR" "$(size_of_environment)" "The environment" "Python 环境"
            ;;
    esac
}

# The app takes this shell's place, so that signals and the exit code are its own.
run_here() {
    write_record $$ ""
    unlock_records
    tell_when_ready 0.1
    exec "$@"
}

# tell_when_ready EVERY: in the background, for as long as this process lives. Nobody's child, so that the app that takes
# the place of this shell has none that it does not know.
tell_when_ready() {
    (
        (if await_ready "$1" has_process $$; then
            tell_ways "this terminal" "Ctrl-C, or $(this_script stop)" "本终端" "Ctrl-C 或 $(this_script stop)"
        fi) &
    )
}

run_detached() {
    local log=$RUN_DIR/$PORT.log code=0 detach=nohup
    mkdir -p "$RUN_DIR" || fail "RUN_DIR '$RUN_DIR' cannot be made: give a folder that can be written" "无法创建 RUN_DIR '$RUN_DIR'：请指定可写的目录"
    [[ ! -s $log ]] || mv "$log" "$log.1"
    ! command -v setsid >/dev/null || detach=setsid
    (umask 077 && : >"$log")
    "$detach" "$@" >>"$log" 2>&1 </dev/null 8<&- &
    pid=$!
    write_record "$pid" "$log"
    unlock_records
    trap 'say "It goes on starting. Stop: $(this_script stop)" "启动继续进行。停止：$(this_script stop)"; exit 130' INT
    await_ready 0.05 has_process "$pid" || code=$?
    trap - INT
    case $code in
        0)
            rm -f "$(record_file).last"
            tell_ways "$log (pid $pid)" "$(this_script stop)"
            ;;
        1)
            forget_start
            tail -n 20 "$log" >&2
            fail "The app ended while it started; the end of its log is above ($log)" "应用在启动时退出；日志末尾见上（$log）"
            ;;
        *)
            fail "It is not ready after $READY_TIMEOUT s (READY_TIMEOUT), and goes on starting. Log: $log. Stop: $(this_script stop)" \
                "$READY_TIMEOUT 秒后（READY_TIMEOUT）仍未就绪，启动继续进行。日志：$log。停止：$(this_script stop)"
            ;;
    esac
}

# -- and the rest ---------------------------------------------------------------------------------------------------

nothing_runs() {
    rm -f "$(pid_file)"
    say "Nothing that this script started runs on port $PORT" "端口 $PORT 上没有由本脚本启动的应用"
}

end_it() {
    if ! lives; then
        nothing_runs
        return
    fi
    say "Stopping pid $pid; a running request may finish. Once more: at once" "正在停止进程 $pid；正在运行的请求可以完成。再次执行则立即停止"
    kill -TERM "$pid" 2>/dev/null || true
    local until=$((SECONDS + STOP_TIMEOUT))
    while lives; do
        ((SECONDS < until)) ||
            fail "Pid $pid still runs after $STOP_TIMEOUT s (STOP_TIMEOUT). Stop it once more to end it at once" \
                "$STOP_TIMEOUT 秒后（STOP_TIMEOUT）进程 $pid 仍在运行。再次执行 stop 可立即结束"
        sleep 0.1
    done
    say "Stopped" "已停止"
}

stop_service() {
    end_it
    forget_record
}

# 0: runs; 3: does not.
status_service() {
    if ! lives; then
        nothing_runs
        return 3
    fi
    say "Runs: pid $pid, $(address)" "正在运行：进程 $pid，$(address)"
    say "Log: ${log:-its terminal}" "日志：${log:-其终端}"
    if is_ready; then
        (cd "$PROJECT_DIR" && "$VENV_DIR/bin/python" -m gpu_manager status --url "$(address)")
    else
        say "Not ready yet, or on its way out" "尚未就绪，或正在退出"
    fi
}

logs_service() {
    local follow=() file=$RUN_DIR/$PORT.log
    ! lives || [[ -n $log ]] ||
        fail "It writes to the terminal in which it was started (pid $pid); with --detach there is a log" "它输出到启动时的终端（进程 $pid）；用 --detach 启动才有日志"
    [[ -e $file ]] || fail "There is no log of port $PORT: the app writes to its terminal unless it was started with --detach" \
        "没有端口 $PORT 的日志：未用 --detach 启动时，应用输出到其终端"
    [[ $FOLLOW != 1 ]] || follow=(-F)
    exec tail -n 100 "${follow[@]}" "$file"
}

# What is known of the last start stays known until the next one has begun.
restart_service() {
    end_it
    start_service
}
