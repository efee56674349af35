# Which app stop, status, logs and restart mean. Needs environment.sh, records.sh, container.sh.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154 # the settings are those of the script that sources this

# Prints what this script has started and what runs, one a line: kind, port, pid or name of the container, since when.
running_apps() {
    local file name since
    for file in "$RUN_DIR"/*.run; do
        [[ ! -O $file ]] || (running_app "$file")
    done
    command -v docker >/dev/null || return 0
    for name in $(docker ps --filter "label=$LABEL.port" --format '{{.Names}}' 2>/dev/null || true); do
        since=$(docker container inspect --format '{{.State.StartedAt}}' "$name")
        printf 'container\t%s\t%s\t%s\n' "$(label port "$name")" "$name" "$(date -d "$since" '+%F %H:%M' 2>/dev/null || echo "$since")"
    done
}

# running_app RECORD: a line of one that is a process.
running_app() {
    local PORT=${1##*/}
    PORT=${PORT%.run}
    ! { read_record && lives; } || printf 'service\t%s\t%s\t%s\n' "$PORT" "$pid" "$(date -r "$1" '+%F %H:%M')"
}

# Sets PORT, and what leads to the container, where one app runs that may be meant. Of several it tells how to name one; where
# none runs, the settings stay what they are.
find_app() {
    local found=() app kind port name since
    [[ $name_was_given == no ]] || return 0
    while IFS=$'\t' read -r kind port name since; do
        [[ $DOCKER == 0 || $kind == container ]] || continue
        [[ $port_was_given == no || $port == "$PORT" ]] || continue
        found+=("$kind $port $since $name")
    done < <(running_apps)
    ((${#found[@]} < 2)) || tell_several
    for app in "${found[@]}"; do
        read -r kind PORT _ _ name <<<"$app"
        [[ $kind == service ]] || DOCKER=1 CONTAINER_NAME=$name
    done
}

# Ends the script.
tell_several() {
    local app kind PORT date time name what
    say "❌ ${#found[@]} apps run. Name one:" "❌ 有 ${#found[@]} 个应用正在运行，请指定其中一个：" >&2
    for app in "${found[@]}"; do
        read -r kind PORT date time name <<<"$app"
        what=$(in_words "pid $name" "进程 $name")
        [[ $kind == service ]] || CONTAINER_NAME=$name what=$(in_words "container $name" "容器 $name")
        say "   port $PORT, $what, since $date $time: $(this_script "$action")" \
            "   端口 $PORT，$what，始于 $date $time：$(this_script "$action")" >&2
    done
    exit 1
}
