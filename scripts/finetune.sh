# Stage 1.   source scripts/finetune.sh
#            bash finetune DATASET STRATEGY EXAMPLES_PER_CLASS MAX_TRAIN_STEPS [--flag value ...]
# STRATEGY: ti, db or ti_db; EXAMPLES_PER_CLASS: -1 for all. MODEL_NAME names another base model, MIXED_PRECISION
# (no, fp16, bf16) the precision. The GPUs are those of CUDA_VISIBLE_DEVICES; more than one are used through accelerate.

if [ -n "${BASH_VERSION:-}" ]; then
    . "$(dirname "${BASH_SOURCE[0]}")/common.sh"
else
    . "$(dirname "${(%):-%x}")/common.sh"
fi

# How many GPUs stage 1 gets: the entries of CUDA_VISIBLE_DEVICES (empty: none), else all there are; 0 without one.
_diffmix_processes() {
    if [ -n "${NUM_PROCESSES:-}" ]; then
        printf '%s\n' "$NUM_PROCESSES"
    elif [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        printf '%s\n' "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c . || :
    else # a failing nvidia-smi writes its message, of several lines, where the list would stand
        { nvidia-smi --list-gpus 2>/dev/null || :; } | grep -c '^GPU [0-9]' || :
    fi
}

finetune() {
    _diffmix_usage finetune "DATASET STRATEGY EXAMPLES_PER_CLASS MAX_TRAIN_STEPS" 4 "$@" || return $?
    local dataset="$1" strategy="$2" examples="$3" steps="$4" processes
    shift 4
    processes="$(_diffmix_processes)"
    case "$processes" in
        *[!0-9]*)
            printf 'error: NUM_PROCESSES=%s: expected a whole number\n' "$processes" >&2
            return 2
            ;;
    esac
    # ${A:+--flag} ${A:+"$A"} are two words in zsh too, which does not split ${A:+--flag "$A"}
    set -- "$DIFFMIX_ROOT/train_lora.py" --dataset "$dataset" --finetune_strategy "$strategy" \
        --recipe "$(_diffmix_recipe "$dataset")" --resume_from_checkpoint latest \
        --examples_per_class "$examples" --max_train_steps "$steps" \
        --pretrained_model_name_or_path "${MODEL_NAME:-stable-diffusion-v1-5/stable-diffusion-v1-5}" \
        ${MIXED_PRECISION:+--mixed_precision} ${MIXED_PRECISION:+"$MIXED_PRECISION"} "$@"
    if [ "$processes" -gt 1 ]; then
        "$(_diffmix_python)" -m accelerate.commands.accelerate_cli launch --quiet --multi_gpu --num_machines 1 \
            --num_processes "$processes" --mixed_precision "${MIXED_PRECISION:-no}" --dynamo_backend no "$@"
    else # accelerate's launcher would hide the program's exit status and add a traceback of its own
        "$(_diffmix_python)" "$@"
    fi
}
