# restart of the app as a process: one that fails brings back the app that ran. Needs service.sh.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154 # the settings are those of the script that sources this

# What is known of the last start stays known until the next one is ready.
restart_service() {
    local passed code before
    if ! lives; then
        nothing_runs
        start_service
        return
    fi
    before=$pid
    app_arguments
    (prepare_start 0) # before what runs is ended, which has the port still
    end_it
    follow launch_anew
    case $code in
        0 | 130 | 143) exit "$code" ;; # those of Ctrl-C and of SIGTERM
    esac
    came_to_nothing || exit "$code"
    bring_back
}

launch_anew() {
    choose_gpu # by the memory that is free now
    launch
}

# follow COMMAND...: runs it in a shell of its own, while this one waits and passes on what would end it. Sets code.
follow() {
    local child
    (
        trap - INT TERM
        "$@"
    ) &
    child=$!
    trap 'kill -TERM "$child" 2>/dev/null || true' TERM
    trap : INT # a terminal sends it to both
    while
        code=0
        wait "$child" || code=$?
        ((code > 128)) && has_process "$child"
    do :; done
    trap - INT TERM
}

# Whether what was started was never ready: then the record from before is there still, or again.
came_to_nothing() { [[ -e $(record_file).last ]] || { read_record && [[ $pid == "$before" ]]; }; }

# Ends the script, with the app that ran before in its place again if that can be.
bring_back() {
    say "❌ The restart has failed (see above). The app that ran before is started again, with the settings that it had" \
        "❌ 重启失败（见上）。正在按原来的设置重新启动之前运行的应用" >&2
    if [[ -e $(record_file).last ]]; then
        end_at_once
        forget_start
    fi
    follow start_as_before
    ((code == 0)) ||
        fail "It did not start again either (see above): nothing serves on port $PORT now. Once the cause is mended: $(this_script restart)" \
            "之前的应用也无法启动（见上）：端口 $PORT 上目前没有服务。排除原因后请执行：$(this_script restart)"
    fail "The restart has failed, as said above. The app is the one from before, with the settings that it had" \
        "重启失败，原因见上。应用为之前的那一个，设置不变"
}

# By the record alone: what was given for the restart is not meant.
start_as_before() {
    local name command=("$here/start_with_gpu_management.sh" restart --port "$PORT" --run-dir "$RUN_DIR"
        --ready-timeout "$READY_TIMEOUT" --stop-timeout "$STOP_TIMEOUT")
    for name in "${SETTINGS[@]}" "${PUBLIC[@]}"; do unset "$name" "GPU_TTS_$name"; done
    exec "${command[@]}"
}

# What has not become ready in time.
end_at_once() {
    local until=$((SECONDS + STOP_TIMEOUT))
    read_record && lives || return 0
    kill -TERM "$pid" 2>/dev/null || true
    while lives && ((SECONDS < until)); do sleep 0.1; done
    ! lives || kill -KILL "$pid" 2>/dev/null || true
}
