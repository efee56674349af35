# Which GPU the start script takes, and whether its driver is new enough. Needs environment.sh.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154 # the settings are those of the script that sources this

#: Major version of CUDA that a torch build has -> oldest driver for it (NVIDIA, CUDA Compatibility).
declare -rA OLDEST_DRIVER=([11]=450 [12]=525 [13]=580)
#: The CUDA of torch 2.13 as PyPI has it, which requirements.txt pins.
readonly CUDA_OF_PINS=13
#: A driver in trouble can make nvidia-smi hang, so that no signal ends it.
readonly NVIDIA_SMI_S=30

# Sets rows (of nvidia-smi, one a GPU) and driver; or trouble, in English and Chinese, if there are none.
ask_nvidia_smi() {
    local said code=0
    rows='' trouble=() driver=''
    if ! command -v nvidia-smi >/dev/null; then
        trouble=("nvidia-smi is not here" "找不到 nvidia-smi")
        return
    fi
    # Read to its end, but not waited for.
    IFS= read -r -d '' -t "$NVIDIA_SMI_S" said < <(
        exec nvidia-smi --query-gpu=index,memory.free,driver_version,name --format=csv,noheader,nounits 2>&1
    ) || code=$?
    if ((code > 128)); then
        kill -KILL "${!:-}" 2>/dev/null || true
        trouble=("nvidia-smi does not answer within $NVIDIA_SMI_S s" "nvidia-smi 在 $NVIDIA_SMI_S 秒内没有响应")
        return
    fi
    # Of several GPUs one may be broken; then there are other lines, too.
    rows=$(grep -E '^ *[0-9]+,' <<<"$said") || true
    if [[ -n $rows ]]; then
        driver=$(cut -d , -f 3 <<<"${rows%%$'\n'*}")
        driver=${driver// /}
    elif [[ $said == *[![:space:]]* ]]; then
        trouble=("nvidia-smi fails: ${said%%$'\n'*}" "nvidia-smi 执行失败：${said%%$'\n'*}")
    else
        trouble=("nvidia-smi lists none" "nvidia-smi 没有列出 GPU")
    fi
}

# Finds the GPU: sets gpu (its number, or empty), driver, and CUDA_VISIBLE_DEVICES for what is started here.
choose_gpu() {
    local rows trouble index free name chosen_free=-1 chosen_name='' known=''
    gpu='' driver=''
    if [[ $GPU_ID == none ]]; then
        export CUDA_VISIBLE_DEVICES=''
        say "GPU: none, as asked for; the CPU is used" "GPU：按要求不使用，使用 CPU"
        return
    fi
    ask_nvidia_smi
    if [[ -z $GPU_ID && -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        gpu=$CUDA_VISIBLE_DEVICES
        [[ $gpu != -* ]] || gpu='' # -1 is none
        say "GPU: as CUDA_VISIBLE_DEVICES='$CUDA_VISIBLE_DEVICES' says" "GPU：按 CUDA_VISIBLE_DEVICES='$CUDA_VISIBLE_DEVICES'"
        return
    fi
    if ((${#trouble[@]})); then
        [[ -z $GPU_ID ]] ||
            fail "$(named GPU_ID) cannot be used: ${trouble[0]}. Give GPU_ID=none to use the CPU" "无法使用 $(named GPU_ID)：${trouble[1]}。使用 CPU 请设 GPU_ID=none"
        say "GPU: none (${trouble[0]}); the CPU is used" "GPU：无（${trouble[1]}），使用 CPU"
        # PyTorch would meet the same trouble, or hang. Without nvidia-smi some containers have a GPU all the same.
        ! command -v nvidia-smi >/dev/null || export CUDA_VISIBLE_DEVICES=''
        return
    fi
    while IFS=, read -r index free _ name; do
        index=${index// /}
        free=${free//[^0-9]/} # "[N/A]" where GPU and host share one memory
        known+=" $index"
        if [[ $index == "$GPU_ID" || (-z $GPU_ID && ${free:-0} -gt $chosen_free) ]]; then
            gpu=$index chosen_free=${free:-0} chosen_name=${name# }
        fi
    done <<<"$rows"
    [[ -n $gpu ]] || fail "There is no $(named GPU_ID); nvidia-smi lists:$known" "没有 $(named GPU_ID)；nvidia-smi 列出：$known"
    export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=$gpu # numbered as nvidia-smi does
    if [[ -n $GPU_ID ]]; then
        say "GPU: $gpu ($chosen_name), as asked for; $chosen_free MiB free" "GPU：按指定使用 $gpu（$chosen_name），空闲 $chosen_free MiB"
    else
        say "GPU: $gpu ($chosen_name) has the most free memory, $chosen_free MiB, of:$known" \
            "GPU：$gpu（$chosen_name）空闲显存最多，$chosen_free MiB；共有：$known"
    fi
}

# check_driver VERSION_PY WHERE: whether the driver is new enough for a torch, by the text of its version.py. Importing it takes seconds.
check_driver() {
    local cuda oldest build=("set TORCH_INDEX_URL" "设置 TORCH_INDEX_URL") with_cuda=("start without TORCH_INDEX_URL" "在不设 TORCH_INDEX_URL 的情况下重新启动")
    [[ -n $gpu && $driver == [0-9]* && -n $1 ]] || return 0
    case $(environment_state "$2") in
        foreign)
            build=("install it into $2" "将其装入 $2")
            with_cuda=("install another torch into it" "在其中安装其他 torch")
            ;;
        ready) build=("remove $2 and ${build[0]}" "删除 $2 并${build[1]}") with_cuda=("remove $2 and ${with_cuda[0]}" "删除 $2，并${with_cuda[1]}") ;;
    esac
    cuda=$(sed -n "s/^cuda[^=]*= *'\([0-9]*\).*/\1/p" <<<"$1")
    if [[ -z $cuda ]]; then
        say "⚠️  The torch in $2 is built without CUDA, so the GPU is not used. For one with it, ${with_cuda[0]}" \
            "⚠️  $2 中的 torch 不含 CUDA，不会使用 GPU。如需 GPU，请${with_cuda[1]}"
        return
    fi
    oldest=${OLDEST_DRIVER[$cuda]:-0}
    ((${driver%%.*} >= oldest)) ||
        fail "Driver $driver is too old for torch with CUDA $cuda, which needs $oldest or newer. Update the driver, take another build of torch (${build[0]}; see pytorch.org), or give GPU_ID=none" \
            "驱动 $driver 过旧：CUDA $cuda 的 torch 需要 $oldest 或更高版本。请更新驱动，或换用其他 torch（${build[1]}，参见 pytorch.org），或设 GPU_ID=none"
}

# What version.py of the torch will say that an install of the pins brings; nothing where another build is asked for.
torch_of_pins() {
    [[ -n ${TORCH_INDEX_URL:-} ]] || ! grep -q '^torch==' "$PROJECT_DIR/requirements.txt" || echo "cuda = '$CUDA_OF_PINS'"
}
