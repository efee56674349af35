# The app as a process of this machine: start, and from another terminal stop, status, restart, logs. How that finds it
# is in records.sh. Needs environment.sh, checks.sh.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154 # the settings are those of the script that sources this

# Where a browser finds it.
address() {
    local host
    host=$(reached_at)
    [[ $host != *:* ]] || host="[$host]"
    printf '%s://%s:%s' "$(scheme)" "$host" "$PORT"
}

# Whether the app has TLS of its own.
scheme() {
    if [[ " ${arguments[*]} " == *" --ssl-certfile"[=\ ]* ]] || [[ $kind == container && $action != start && $(label scheme) == https ]]; then
        echo https
    else
        echo http
    fi
}

# An address that reaches HOST from here.
reached_at() {
    case $HOST in
        0.0.0.0) echo 127.0.0.1 ;;
        :: | '[::]') echo ::1 ;;
        *) echo "$HOST" ;;
    esac
}

# Whether /readyz answers 200. Bash itself asks: a Python would take longer to start than the answer to come. Where there is TLS,
# it takes one; the certificate is of a name, which is not the one that is asked here.
is_ready() {
    local python
    if [[ $(scheme) == https ]]; then
        python=$(command -v "$VENV_DIR/bin/python" python3 | head -n 1)
        "$python" -Ic 'import ssl, sys, urllib.request as r
r.build_opener(r.ProxyHandler({}), r.HTTPSHandler(context=ssl._create_unverified_context())).open(sys.argv[1], timeout=5)' \
            "$(address)/readyz" 2>/dev/null
        return
    fi
    (
        exec 3<>"/dev/tcp/$(reached_at)/$PORT" || exit 1
        printf 'GET /readyz HTTP/1.0\r\nHost: %s:%s\r\n\r\n' "$(reached_at)" "$PORT" >&3
        IFS= read -r -t 5 answer <&3
        [[ $answer == HTTP/*' 200 '* ]]
    ) 2>/dev/null
}

# await_ready EVERY [PID]: wait until the process is ready, or else the container; 1 if it ends, 2 after READY_TIMEOUT.
await_ready() {
    local every=$1 began=$SECONDS told=0 pid=${2:-}
    # Who listens for a container is not the process that began it.
    until is_ready && { [[ -z $pid || $DOCKER == 1 ]] || is_served_by "$pid"; }; do
        if [[ -n $pid ]]; then has_process "$pid"; else container_runs; fi || return 1
        if ((SECONDS - began >= READY_TIMEOUT)); then
            return 2
        elif ((SECONDS - began >= told + 10)); then
            told=$((SECONDS - began))
            say "Still starting, $told s" "仍在启动，已 $told 秒"
        fi
        sleep "$every"
    done
}

# Whether a process, or a child of it, listens on the port: somebody else may have taken that while it started. Where it
# cannot be known who listens, it is taken to be the one.
is_served_by() {
    local holder holders
    has_process "$1" || return 1
    holders=$(holders_of_port)
    for holder in $holders; do
        [[ $holder != "$1" ]] && ! grep -qsx "PPid:[[:space:]]*$1" "/proc/$holder/status" || return 0
    done
    [[ -z $holders ]]
}

# tell_ways LOG STOP [LOG_ZH STOP_ZH]: says where it is, and how to look into it and end it.
tell_ways() {
    say "✅ Ready: $(address)" "✅ 已就绪：$(address)"
    say "   Log: $1" "   日志：${3:-$1}"
    say "   Stop: $2" "   停止：${4:-$2}"
}

# this_script ACTION: how this script is called for this app, also if there are others.
this_script() {
    printf '%s %s' "$(quoted "$0" | cut -c 2-)" "$1"
    if [[ $kind == container ]]; then
        printf ' --docker'
        quoted --container-name "$CONTAINER_NAME"
    else
        printf ' --port %s' "$PORT"
        [[ $RUN_DIR == "$PROJECT_DIR/.run" ]] || quoted --run-dir "$RUN_DIR"
    fi
    [[ $PROJECT_DIR == "$here" ]] || quoted --project-dir "$PROJECT_DIR"
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
    local passed
    app_arguments
    prepare_start "$PORT" # the port before an install of minutes, and again after it
    if [[ $check == yes ]]; then
        tell_plan "$VENV_DIR/bin/python" "$PROJECT_DIR/app.py" "${passed[@]}"
    else
        launch
    fi
}

# prepare_start PORT: all that can make a start impossible; ends the script if it is. Port 0: any will do.
prepare_start() {
    local python=$VENV_DIR/bin/python
    "$python" -Ic '' 2>/dev/null || python=$(find_python)
    check_port "$python" "$1"
    choose_gpu
    check_install
    [[ $DETACH == 0 ]] || check_run_dir
    if [[ $check == yes ]]; then
        plan_environment "$VENV_DIR" "$PROJECT_DIR/requirements.txt"
    else
        prepare_environment "$VENV_DIR" "$PROJECT_DIR/requirements.txt"
    fi
    check_driver "$(torch_of_environment)" "$VENV_DIR"
}

launch() {
    local command=("$VENV_DIR/bin/python" "$PROJECT_DIR/app.py" "${passed[@]}")
    lock_records
    refuse_second_start
    check_port "$VENV_DIR/bin/python" "$PORT"
    say "Starting $(address)" "正在启动 $(address)"
    if [[ $DETACH == 1 ]]; then run_detached "${command[@]}"; else run_here "${command[@]}"; fi
}

# tell_plan COMMAND...
tell_plan() {
    say "Would run:$(quoted "$@")" "将执行：$(quoted "$@" | cut -c 2-)"
    [[ $DETACH == 0 || $kind == container ]] ||
        say "Would run in the background; log: $RUN_DIR/$PORT.log, pid: $(pid_file)" "将在后台运行；日志：$RUN_DIR/$PORT.log，进程号：$(pid_file)"
    say "Would wait for $(address)/readyz, at most $READY_TIMEOUT s" "随后等待 $(address)/readyz，最多 $READY_TIMEOUT 秒"
    say "Nothing was changed" "未做任何改动"
}

torch_of_environment() { cat "$VENV_DIR"/lib/python3*/site-packages/torch/version.py 2>/dev/null || true; }

# The folder of an environment that is not ready yet must have room for it, and the driver be one for its torch.
check_install() {
    case $(environment_state "$VENV_DIR" "$PROJECT_DIR/requirements.txt") in
        absent | broken)
            [[ -z $STEP_AUDIO_ROOT || $VENV_DIR != "$STEP_AUDIO_ROOT"/* ]] ||
                fail "There is no Python environment $VENV_DIR, and nothing is made in a checkout: make it as Step-Audio-EditX says, or leave VENV_DIR out" \
                    "没有 Python 环境 $VENV_DIR，且不会在代码目录中新建：请按 Step-Audio-EditX 的说明创建，或不设置 VENV_DIR"
            check_writable VENV_DIR
            check_disk "$VENV_DIR" "$(size_of_environment)" "The environment" "Python 环境"
            ;;&
        absent | broken | outdated) [[ -n $(torch_of_environment) ]] || check_driver "$(torch_of_pins)" "$VENV_DIR" ;;
    esac
}

# The app takes this shell's place, so that signals and the exit code are its own.
run_here() {
    write_record "$BASHPID" ""
    unlock_records
    tell_when_ready 0.1
    exec "$@"
}

# tell_when_ready EVERY: in the background, for as long as this process lives. Nobody's child, so that the app that takes
# the place of this shell has none that it does not know.
tell_when_ready() {
    local app=$BASHPID
    (
        (if await_ready "$1" "$app"; then
            rm -f "$(record_file).last"
            tell_ways "this terminal" "Ctrl-C, or $(this_script stop)" "本终端" "Ctrl-C 或 $(this_script stop)"
        fi) &
    )
}

run_detached() {
    local log=$RUN_DIR/$PORT.log code=0 detach=nohup
    mkdir -p "$RUN_DIR" || fail "$(named RUN_DIR) cannot be made: give a folder that can be written" "无法创建 $(named RUN_DIR)：请指定可写的目录"
    [[ ! -s $log ]] || mv "$log" "$log.1"
    ! command -v setsid >/dev/null || detach=setsid
    (umask 077 && rm -f "$log" && set -o noclobber && : >"$log") ||
        fail "The log $log cannot be made anew: remove it, or give another folder with --run-dir" \
            "无法新建日志 $log：请删除它，或用 --run-dir 换一个目录"
    "$detach" "$@" >>"$log" 2>&1 </dev/null 8<&- &
    pid=$!
    write_record "$pid" "$log"
    unlock_records
    trap 'say "It goes on starting. Stop: $(this_script stop)" "启动继续进行。停止：$(this_script stop)"; exit 130' INT
    await_ready 0.05 "$pid" || code=$?
    trap - INT
    case $code in
        0)
            rm -rf "$(record_file).last"
            tell_ways "$log (pid $pid)" "$(this_script stop)"
            ;;
        1)
            forget_start
            tail -n 20 "$log" >&2
            fail "The app ended while it started; the end of its log is above ($log)" "应用在启动时退出；日志末尾见上（$log）"
            ;;
        *)
            [[ -z ${before:-} ]] ||
                fail "It is not ready after $READY_TIMEOUT s (READY_TIMEOUT). Log: $log" "$READY_TIMEOUT 秒后（READY_TIMEOUT）仍未就绪。日志：$log"
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
        ((SECONDS < until)) || [[ $action != restart ]] ||
            fail "Pid $pid still runs after $STOP_TIMEOUT s (STOP_TIMEOUT), so nothing else was started. Once it has ended, nothing serves on port $PORT: $(this_script restart). If it hangs: kill -9 $pid" \
                "$STOP_TIMEOUT 秒后（STOP_TIMEOUT）进程 $pid 仍在运行，因此未启动新的应用。它退出后端口 $PORT 上将没有服务：$(this_script restart)。如已卡死：kill -9 $pid"
        ((SECONDS < until)) ||
            fail "Pid $pid still runs after $STOP_TIMEOUT s (STOP_TIMEOUT). Stop it once more to end it at once; if it hangs: kill -9 $pid" \
                "$STOP_TIMEOUT 秒后（STOP_TIMEOUT）进程 $pid 仍在运行。再次执行 stop 可立即结束；如已卡死：kill -9 $pid"
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
        # A proxy would reach another machine at this address.
        (cd "$PROJECT_DIR" && no_proxy="${no_proxy:-${NO_PROXY:-}},$(reached_at)" "$VENV_DIR/bin/python" -m gpu_manager status --url "$(address)")
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

