# The app in a container: needs Docker, and for a GPU the NVIDIA Container Toolkit. What docker is told of it is in
# container_run.sh. Needs environment.sh, gpu.sh, checks.sh, service.sh.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154 # the settings are those of the script that sources this
#
# The container has the host's network: then an address of this machine means here what it means outside, and the panel
# knows who is local.
#
# A container of that name that somebody else made is kept under another name, and gets its own back at `stop`.

readonly LABEL=gpu-managed-tts

need_docker() {
    command -v docker >/dev/null ||
        fail "docker is not here: install it (https://docs.docker.com/engine/install/), or start without --docker" \
            "找不到 docker：请安装（https://docs.docker.com/engine/install/），或不使用 --docker"
    local why
    why=$(docker info 2>&1 >/dev/null) ||
        fail "docker does not answer: ${why%%$'\n'*}. Start its daemon (sudo systemctl start docker), or let this user use it (group docker)" \
            "docker 无响应（${why%%$'\n'*}）：请启动其服务（sudo systemctl start docker），或将当前用户加入 docker 组"
}

# label NAME CONTAINER: what this script has noted there.
label() { docker container inspect --format "{{index .Config.Labels \"$LABEL.$1\"}}" "${2:-$CONTAINER_NAME}" 2>/dev/null || true; }

# container_state [CONTAINER]: prints absent, or ours/other and its state.
container_state() {
    local status
    status=$(docker container inspect --format '{{.State.Status}}' "${1:-$CONTAINER_NAME}" 2>/dev/null) || {
        echo absent
        return
    }
    if [[ $(label port "${1:-$CONTAINER_NAME}") =~ ^[0-9]+$ ]]; then echo "ours $status"; else echo "other $status"; fi
}

# restarts_of CONTAINER: its restart policy.
restarts_of() { docker container inspect --format '{{.HostConfig.RestartPolicy.Name}}:{{.HostConfig.RestartPolicy.MaximumRetryCount}}' "$1"; }

container_runs() { [[ $(container_state) == "ours running" ]]; }

# The name under which a container is kept that was here before ours.
kept_as() { echo "$CONTAINER_NAME-before-gpu-management"; }

# For all that comes after a start: the container listens where it was told to.
remember_container() {
    need_docker
    local name
    for name in HOST PORT; do
        local noted
        noted=$(label "${name,,}")
        [[ -z $noted || $noted == "<no value>" ]] || printf -v "$name" '%s' "$noted"
    done
    [[ $action == restart ]] || return 0
    for name in "${!given[@]}"; do
        is_one_of "$name" DOCKER CONTAINER_NAME READY_TIMEOUT STOP_TIMEOUT || [[ $name == PORT && ${given[PORT]} == "$PORT" ]] ||
            fail "A container keeps the settings that it was started with; for others: start --docker --replace" \
                "容器保留启动时的设置；如需更改请用：start --docker --replace"
    done
    ((${#arguments[@]} == 0)) ||
        fail "A container keeps the arguments that it was started with; for others: start --docker --replace" \
            "容器保留启动时的参数；如需更改请用：start --docker --replace"
}

start_container() {
    need_docker
    local digest state gpus=() folders=() build run passed
    choose_gpu
    choose_gpu_of_container
    state=$(container_state)
    check_name "$state"
    # What runs in the container that is replaced may hold the port.
    [[ $state == *" running" ]] || ! is_listening "$PORT" || port_in_use "$(port_beside)"
    check_port_of_container
    container_command
    digest=$(source_digest)
    build=(docker build --tag "$IMAGE" --label "$LABEL.source=$digest" --build-arg "BASE_IMAGE=$BASE_IMAGE"
        --build-arg "TORCH_INDEX_URL=${TORCH_INDEX_URL:-}" --build-arg PIP_INDEX_URL --build-arg PIP_EXTRA_INDEX_URL "$PROJECT_DIR")
    if image_is_current "$digest"; then
        build=()
        say "Image: $IMAGE is up to date" "镜像：$IMAGE 已是最新"
        check_driver "$(torch_of_image)" "$IMAGE"
    else
        [[ $BASE_IMAGE != python:* ]] || check_driver "$(torch_of_pins)" "$IMAGE" # others have a torch of their own
        check_disk_of_docker
    fi
    if [[ $check == yes ]]; then
        tell_container_plan "$state"
        return
    fi
    if ((${#build[@]})); then
        "${build[@]}" || fail "The image could not be built (see above): check the network and the disk space, and run this again" \
            "镜像构建失败（见上）：请检查网络与磁盘空间后重试"
        check_driver "$(torch_of_image)" "$IMAGE"
    fi
    local folder
    for folder in "${folders[@]}"; do make_folder "$folder"; done
    make_place "$state"
    say "Starting $(address)" "正在启动 $(address)"
    if [[ $DETACH == 1 ]]; then
        "${run[@]}" >/dev/null || undo_start
        hold_kept
        if has_aside; then
            (await_container) || bring_container_back
            docker rm "$(aside)" >/dev/null
        else
            await_container
        fi
    else
        DOCKER=1 tell_when_ready 0.5
        exec "${run[@]}"
    fi
}

# make_folder FOLDER: one that the app may write to. Docker would make it for root alone.
make_folder() {
    [[ ! -d $1 ]] || return 0
    mkdir -p "$1" || fail "$1 cannot be made: give another folder" "无法创建 $1：请换一个目录"
    ((EUID)) || chown "$IMAGE_USER" "$1"
}

# check_name STATE: refuses to take a name without --replace; what is left of a container of ours that has ended is no obstacle.
check_name() {
    case $1 in
        absent | "ours exited" | "ours created" | "ours dead") return ;;
    esac
    [[ $REPLACE == 1 ]] ||
        fail "There is a container $CONTAINER_NAME already (${1#* }). Give --replace to put this one in its place, or another --container-name" \
            "已有容器 $CONTAINER_NAME（${1#* }）。用 --replace 替换它，或用 --container-name 换一个名字"
    [[ $1 == ours* || $(docker container inspect --format '{{.HostConfig.AutoRemove}}' "$CONTAINER_NAME") != true ]] ||
        fail "The container $CONTAINER_NAME was started with --rm: once it is stopped it is gone and cannot be kept. If what starts it can make it anew, stop it yourself (docker stop $CONTAINER_NAME) and run this again" \
            "容器 $CONTAINER_NAME 是用 --rm 启动的：一旦停止即被删除，无法保留。如果原来的启动方式能重新创建它，请自行停止（docker stop $CONTAINER_NAME），然后重新运行"
    [[ $1 == ours* || $(container_state "$(kept_as)") == absent ]] ||
        fail "$CONTAINER_NAME is somebody else's, and there is a $(kept_as) already: remove or rename one of them (docker rename)" \
            "容器 $CONTAINER_NAME 不是本脚本创建的，且 $(kept_as) 已存在：请删除或重命名其中之一（docker rename）"
}

tell_container_plan() {
    local folder
    ((${#build[@]} == 0)) || say "Would build:$(quoted "${build[@]}")" "将构建镜像：$(quoted "${build[@]}" | cut -c 2-)"
    case $1 in
        ours*) say "Would replace the container $CONTAINER_NAME" "将替换容器 $CONTAINER_NAME" ;;
        other*) say "Would stop $CONTAINER_NAME and keep it as $(kept_as) until stop" "将停止 $CONTAINER_NAME，并以 $(kept_as) 保留至 stop" ;;
    esac
    for folder in "${folders[@]}"; do
        [[ -d $folder ]] || say "Would make the folder $folder" "将创建目录 $folder"
    done
    tell_plan "${run[@]}"
}

# make_place STATE: the name is free afterwards.
make_place() {
    case $1 in
        "ours running")
            if [[ $DETACH == 1 ]]; then set_aside; else remove_container; fi
            ;;
        ours*) remove_container ;;
        other*)
            docker stop -t "$STOP_TIMEOUT" "$CONTAINER_NAME" >/dev/null
            docker rename "$CONTAINER_NAME" "$(kept_as)" ||
                fail "$CONTAINER_NAME could not be renamed (see above), and is stopped: docker start $CONTAINER_NAME" \
                    "无法重命名 $CONTAINER_NAME（见上），它已停止：docker start $CONTAINER_NAME"
            say "Stopped $CONTAINER_NAME; it is kept as $(kept_as), and is back under its name after stop" \
                "已停止 $CONTAINER_NAME，并以 $(kept_as) 保留；执行 stop 后恢复原名"
            ;;
    esac
}

# The name under which ours is kept until the one in its place is ready.
aside() { echo "$CONTAINER_NAME-replaced"; }

set_aside() {
    [[ $(container_state "$(aside)") == absent ]] || docker rm "$(aside)" >/dev/null
    docker stop -t "$STOP_TIMEOUT" "$CONTAINER_NAME" >/dev/null
    docker rename "$CONTAINER_NAME" "$(aside)" ||
        fail "$CONTAINER_NAME could not be renamed (see above), and is stopped: docker start $CONTAINER_NAME" \
            "无法重命名 $CONTAINER_NAME（见上），它已停止：docker start $CONTAINER_NAME"
}

has_aside() { [[ $(container_state "$(aside)") == ours* ]]; }

# Ends the script, with the container that was set aside in its place again.
bring_container_back() {
    say "❌ The start has failed (see above). The container that ran before is started again" "❌ 启动失败（见上）。正在重新启动之前运行的容器" >&2
    if [[ $(container_state) == ours* ]]; then
        docker stop -t "$STOP_TIMEOUT" "$CONTAINER_NAME" >/dev/null
        docker rm "$CONTAINER_NAME" >/dev/null
    fi
    docker rename "$(aside)" "$CONTAINER_NAME"
    HOST=$(label host) PORT=$(label port)
    if docker start "$CONTAINER_NAME" >/dev/null && (await_container); then
        fail "The new container has failed, as said above; $CONTAINER_NAME is the one from before, with the settings that it had" \
            "新容器启动失败，原因见上；$CONTAINER_NAME 为之前的容器，设置不变"
    fi
    fail "The container $CONTAINER_NAME is down: nothing serves on port $PORT now. Log: $(this_script logs)" \
        "容器 $CONTAINER_NAME 已停止：端口 $PORT 上目前没有服务。日志：$(this_script logs)"
}

# is_listening PORT: whether anybody does there.
is_listening() { (exec 3<>"/dev/tcp/$(reached_at)/$1") 2>/dev/null; }

# A port to take instead.
port_beside() {
    local port=$PORT
    while is_listening "$port"; do port=$((port < 65535 ? port + 1 : 1024)); done
    echo "$port"
}

await_container() {
    local code=0
    await_ready 0.5 || code=$?
    case $code in
        0) tell_ways "$(this_script logs)" "$(this_script stop)" ;;
        1)
            docker logs --tail 20 "$CONTAINER_NAME" >&2 || true
            fail "The container ended while it started; the end of its log is above. $(way_back en)" "容器在启动时退出；日志末尾见上。$(way_back zh)"
            ;;
        *)
            fail "It is not ready after $READY_TIMEOUT s (READY_TIMEOUT), and goes on starting. Log: $(this_script logs)" \
                "$READY_TIMEOUT 秒后（READY_TIMEOUT）仍未就绪，启动继续进行。日志：$(this_script logs)"
            ;;
    esac
}

# way_back en|zh: how things become again as they were before the start.
way_back() {
    [[ $action == start ]] && ! has_aside || return 0 # then they do so by themselves
    if [[ $1 == en ]]; then echo "Back to what was: $(this_script stop)"; else echo "恢复原状：$(this_script stop)"; fi
}

# hold_kept: what is kept does not come back at the next boot. Until ours runs, which knows its policy, it has that itself.
hold_kept() {
    [[ $(container_state "$(kept_as)") == absent ]] || docker update --restart no "$(kept_as)" >/dev/null ||
        say "⚠️  $(kept_as) may be back after the next boot: docker update --restart no $(kept_as)" \
            "⚠️  $(kept_as) 可能在下次开机后自动启动：docker update --restart no $(kept_as)"
}

# The old container has its name again. Docker may have made ours before it could not start it.
undo_start() {
    ! has_aside || bring_container_back
    say "❌ The container could not be started (see above)" "❌ 容器启动失败（见上）" >&2
    [[ $(container_state) != ours* ]] || remove_container
    [[ $(container_state "$(kept_as)") == absent ]] || give_name_back
    exit 1
}

give_name_back() {
    docker rename "$(kept_as)" "$CONTAINER_NAME"
    say "$CONTAINER_NAME is the old container again, stopped: docker start $CONTAINER_NAME" "$CONTAINER_NAME 已恢复为原来的容器（已停止）：docker start $CONTAINER_NAME"
}

# Ours knows how the kept one was restarted: that has it again before ours is gone.
remove_container() {
    local policy
    policy=$(label kept-restarts)
    [[ $policy != [a-z]* || $(container_state "$(kept_as)") == absent ]] || docker update --restart "$policy" "$(kept_as)" >/dev/null
    docker stop -t "$STOP_TIMEOUT" "$CONTAINER_NAME" >/dev/null
    docker rm "$CONTAINER_NAME" >/dev/null
}

# Leaves things as they were before the first start.
stop_container() {
    local known=no
    case $(container_state) in
        ours*)
            known=yes
            say "Stopping $CONTAINER_NAME; a running request may finish" "正在停止 $CONTAINER_NAME；正在运行的请求可以完成"
            remove_container
            say "Stopped" "已停止"
            ;;
        other*)
            fail "The container $CONTAINER_NAME was not started by this script; it is left alone" "容器 $CONTAINER_NAME 不是由本脚本启动的，未做改动"
            ;;
        *) say "There is no container $CONTAINER_NAME" "没有容器 $CONTAINER_NAME" ;;
    esac
    [[ $(container_state "$(kept_as)") != absent ]] || return 0
    if [[ $known == no && $(restarts_of "$(kept_as)") == no* ]]; then # ours, which knew it, was removed by somebody else
        say "⚠️  How it was restarted is not known any more, and it is not now: docker update --restart unless-stopped $CONTAINER_NAME" \
            "⚠️  原来的重启策略已无从得知，现为不自动重启：docker update --restart unless-stopped $CONTAINER_NAME"
    fi
    give_name_back
}

status_container() {
    local state
    state=$(container_state)
    say "Container $CONTAINER_NAME: $state" "容器 $CONTAINER_NAME：$state"
    [[ $state == "ours running" ]] || return 3
    if is_ready; then
        docker exec --env "LC_ALL=$SPEAKS" "$CONTAINER_NAME" python -m gpu_manager status --url "$(address)"
    else
        say "Not ready yet, or on its way out" "尚未就绪，或正在退出"
    fi
}

logs_container() {
    local follow=()
    [[ $FOLLOW != 1 ]] || follow=(--follow)
    exec docker logs --tail 100 "${follow[@]}" "$CONTAINER_NAME"
}

# Its settings stay what they are, so a second start can only mend what has passed, as a port that was not free.
restart_container() {
    [[ $(container_state) == ours* ]] ||
        fail "There is no container $CONTAINER_NAME of this script's: start it" "没有由本脚本创建的容器 $CONTAINER_NAME：请先启动"
    if docker restart -t "$STOP_TIMEOUT" "$CONTAINER_NAME" >/dev/null && (await_container); then return; fi
    if container_runs; then
        ! is_ready ||
            fail "The container $CONTAINER_NAME was not restarted (see above), and serves as before" "容器 $CONTAINER_NAME 未能重启（见上），仍照常提供服务"
        exit 1
    fi
    say "❌ The restart has failed (see above). The container $CONTAINER_NAME is started once more" "❌ 重启失败（见上）。正在再次启动容器 $CONTAINER_NAME" >&2
    if docker start "$CONTAINER_NAME" >/dev/null && (await_container); then
        fail "The restart has failed, as said above; the container $CONTAINER_NAME serves again, with the settings that it had" \
            "重启失败，原因见上；容器 $CONTAINER_NAME 已恢复服务，设置不变"
    fi
    fail "The container $CONTAINER_NAME is down: nothing serves on port $PORT now. Log: $(this_script logs). Once the cause is mended: $(this_script restart)" \
        "容器 $CONTAINER_NAME 已停止：端口 $PORT 上目前没有服务。日志：$(this_script logs)。排除原因后请执行：$(this_script restart)"
}
