# What docker is told: of the image, and of the container's GPU, rights and folders. Needs what container.sh needs.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154 # the settings are those of the script that sources this
#
# Folders lie inside where they lie outside, so that arguments mean the same.

readonly IMAGE_USER=10001 # in the Dockerfile

# What the image is made of, in one number.
source_digest() {
    (
        cd "$PROJECT_DIR" || exit
        printf '%s\n' "$BASE_IMAGE" "${TORCH_INDEX_URL:-}"
        # One that was built here may have been built anew; python's own changes nothing that is used.
        [[ $BASE_IMAGE == python:* ]] || docker image inspect --format '{{.Id}}' "$BASE_IMAGE" 2>/dev/null || true
        find Dockerfile requirements.txt pyproject.toml scripts ./*.py residency -type f ! -path '*/__pycache__/*' | LC_ALL=C sort | xargs -d '\n' sha256sum
    ) | sha256sum | cut -c 1-64
}

# Whether an image is made of what is here now.
image_is_current() {
    [[ $(docker image inspect --format "{{index .Config.Labels \"$LABEL.source\"}}" "$IMAGE" 2>/dev/null) == "$1" ]]
}

# The version.py of the torch in the image, wherever that lies.
torch_of_image() {
    [[ -n $gpu && -n $driver ]] || return 0
    docker run --rm --entrypoint python "$IMAGE" -Ic 'import importlib.util, pathlib
print(pathlib.Path(importlib.util.find_spec("torch").origin).with_name("version.py").read_text())' 2>/dev/null || true
}

check_disk_of_docker() {
    local root needed
    root=$(docker info --format '{{.DockerRootDir}}')
    [[ -d $root ]] || return 0 # on another machine
    needed=$(size_of_environment)
    check_disk "$root" "$needed" "The image" "镜像"
}

# Sets gpus: what docker run is told of them.
choose_gpu_of_container() {
    [[ -n $gpu ]] || return 0
    gpus=(--gpus "\"device=$gpu\"")
    command -v nvidia-container-runtime-hook nvidia-ctk >/dev/null ||
        say "⚠️  The NVIDIA Container Toolkit is not here, and docker needs it to give a GPU to a container (https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/); or give GPU_ID=none" \
            "⚠️  未找到 NVIDIA Container Toolkit，docker 需要它才能向容器提供 GPU（https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/）；或设 GPU_ID=none"
}

# Sets run.
container_command() {
    local policy group name
    run=(docker run --name "$CONTAINER_NAME" --label "$LABEL.host=$HOST" --label "$LABEL.port=$PORT" --init --network host
        --security-opt no-new-privileges --cap-drop ALL --stop-timeout "$STOP_TIMEOUT")
    [[ $DETACH == 0 ]] || run+=(--detach --restart unless-stopped)
    [[ $(scheme) == http ]] || run+=(--label "$LABEL.scheme=https")
    # How the container that is kept was restarted, for when it is back; handed on if this one is replaced in turn.
    if [[ $state == other* ]]; then
        policy=$(restarts_of "$CONTAINER_NAME")
    else
        policy=$(label kept-restarts)
    fi
    [[ -z $policy || $policy == "<no value>" ]] || run+=(--label "$LABEL.kept-restarts=${policy%:0}")
    # Files that it writes are this user's; root's are those of the image's own user.
    if ((EUID)); then
        run+=(--user "$EUID:$(id -g)" --env HOME=/tmp)
        for group in $(id -G); do run+=(--group-add "$group"); done
    fi
    run+=("${gpus[@]}")
    # A hub's id is no folder. What is fetched from there outlives the container.
    [[ ! -d $MODEL_PATH ]] || give_folder "$MODEL_PATH" ro
    [[ -z $MODEL_PATH && " ${arguments[*]} " != *" --enable-auto-transcribe "* ]] || run+=(--volume gpu-managed-tts-hub:/hub)
    [[ -z $STEP_AUDIO_ROOT ]] || give_folder "$STEP_AUDIO_ROOT" ro
    [[ -z $GPU_SNAPSHOT_DIR ]] || give_folder "$GPU_SNAPSHOT_DIR" rw
    give_folders_of_arguments
    app_arguments
    # By name only: values would be seen in the list of processes.
    for name in "${OF_APP[@]}" HF_TOKEN HF_ENDPOINT; do run+=(--env "$name"); done
    run+=(--env "HEALTH_URL=$(address)/healthz" "$IMAGE" "${passed[@]}")
}

# give_folder PATH ro|rw: a folder, or a file, lies inside where it lies outside. One to write into is made before the start, if need be.
give_folder() {
    if [[ $2 == ro ]]; then
        # A private key is nobody else's to read.
        if [[ -f $1 ]]; then check_inside "$1" r "chown $IMAGE_USER"; else check_inside "$1" rx "chmod -R o+rX"; fi
        run+=(--volume "$1:$1:ro")
    else
        check_inside "$1" rwx "chown -R $IMAGE_USER"
        folders+=("$1")
        run+=(--volume "$1:$1")
    fi
}

# check_inside PATH RIGHTS MEND: root's own rights are not those of the image's user.
check_inside() {
    ((EUID == 0)) && [[ -e $1 ]] || return 0
    [[ -n $(find -H "$1" -maxdepth 0 \( -user "$IMAGE_USER" -perm "-u=$2" -o -perm "-o=$2" \)) ]] ||
        fail "$1 is closed to the user $IMAGE_USER, who runs the app in the container: $3$(quoted "$1"), or start this as its owner" \
            "容器中的应用以用户 $IMAGE_USER 运行，该用户无权使用 $1：请执行 $3$(quoted "$1")，或以其所有者身份启动"
}

# Folders that arguments of app.py name.
give_folders_of_arguments() {
    local index flag value folder
    for index in "${!arguments[@]}"; do
        value=${arguments[index]} flag=''
        if [[ $value == --*=* ]]; then
            flag=${value%%=*}= value=${value#*=}
        elif ((index)); then
            flag=${arguments[index - 1]}
        fi
        is_one_of "${flag%=}" --tmp-dir --asr-model --tts-model-id --tokenizer-model-id --ssl-certfile --ssl-keyfile || continue
        folder=$(absolute "$value")
        if [[ $flag == --tmp-dir* ]]; then
            give_folder "$folder" rw
        elif [[ -d $folder || ($flag == --ssl-* && -f $folder) ]]; then
            give_folder "$folder" ro
        else
            continue # the id of a hub
        fi
        if [[ $flag == *= ]]; then arguments[index]=$flag$folder; else arguments[index]=$folder; fi
    done
}
