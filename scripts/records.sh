# What is known of an app that runs as a process. Needs environment.sh.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154 # the settings are those of the script that sources this
#
# What runs is known by its port: RUN_DIR/PORT.pid has its pid, RUN_DIR/PORT.run what stop, status and restart need: pid, when that
# was born, log, folder, arguments and settings, NUL after each. The files are for their owner only: they may hold secrets.

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
        set -o noclobber # what others have put there is not written through
        mkdir -p "$RUN_DIR" && if [[ -f $file ]]; then mv "$file" "$file.last"; else rm -rf "$file"; fi && rm -f "$file.new" "$(pid_file)" &&
            printf '%s\0' "$1" "$(born "$1")" "$2" "$PWD" "${#arguments[@]}" "${arguments[@]}" "${to_remember[@]}" >"$file.new" &&
            mv "$file.new" "$file" && echo "$1" >"$(pid_file)"
    ) || say "⚠️  $(named RUN_DIR) cannot be written: stop, status and restart will not find this app" \
        "⚠️  无法写入 $(named RUN_DIR)：stop、status、restart 将找不到本应用"
}

forget_record() { rm -rf "$(record_file)" "$(record_file).last" "$(pid_file)"; }

# The start came to nothing: what counts for a restart is the one before, if there was one.
forget_start() {
    rm -f "$(pid_file)"
    [[ ! -e $(record_file).last ]] || mv "$(record_file).last" "$(record_file)"
}

has_record() { [[ -e $(record_file) && ! -L $(record_file) ]]; }

# Sets record and count; fails if what is there is not what write_record writes: cut off, empty, no file at all.
load_record() {
    local file index
    file=$(record_file)
    [[ -f $file && -r $file && -z $(tail -c 1 "$file" | tr -d '\0') ]] && mapfile -d '' -t record <"$file" || return 1
    count=${record[4]:-}
    [[ ${record[0]:-} =~ ^[1-9][0-9]*$ && $count =~ ^(0|[1-9][0-9]{0,5})$ ]] || return 1
    ((${#record[@]} >= 5 + count && (${#record[@]} - 5 - count) % 2 == 0)) || return 1
    for ((index = 5 + count; index < ${#record[@]}; index += 2)); do
        is_one_of "${record[index]}" "${REMEMBERED[@]}" || return 1
    done
}

# A damaged record counts as none, and that is said.
tell_of_damage() {
    local record count holder
    has_record && [[ -O $(record_file) ]] && ! load_record || return 0
    holder=$(holders_of_port | head -n 1)
    say "⚠️  $(record_file) is damaged, so what it tells of port $PORT counts for nothing${holder:+; pid $holder listens there}" \
        "⚠️  $(record_file) 已损坏，其中关于端口 $PORT 的记录不再有效${holder:+；进程 $holder 正在监听该端口}" >&2
}

# Sets pid, pid_born, log, started_in, remembered_arguments and remembered[SETTING]; fails if there is no record.
read_record() {
    local file record count index
    file=$(record_file)
    has_record || return 1
    # A restart runs what it says.
    [[ -O $file || $action != start ]] || return 1
    [[ -O $file ]] || fail "What runs on port $PORT was started by the user $(stat -c %U "$file"): be that user (sudo -u)" \
        "端口 $PORT 上的应用由用户 $(stat -c %U "$file") 启动：请以该用户身份执行（sudo -u）"
    load_record || return 1
    pid=${record[0]} pid_born=${record[1]} log=${record[2]} started_in=${record[3]}
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
