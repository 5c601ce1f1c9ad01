# Stage 3.   source scripts/classification.sh
#            main_cls DATASET GPU SEED MODEL RESOLUTION NEPOCH SYNDATA_KEY GAMMA SYNTHETIC_PROB [--flag value ...]
#            main_cls_cutmix     likewise, with CutMix
#            main_cls_waterbird  likewise, tested on Waterbirds by group; with DATASET 'waterbird' it trains there, and the epoch is
#                                chosen by the worst group's accuracy on validation
#            main_cls_fewshot EXAMPLES_PER_CLASS DATASET GPU ...    the rest as main_cls
#            main_cls_imb IMBALANCE_FACTOR DATASET GPU ...          the rest as main_cls
# The data sets of the paper are trained by its recipe (--recipe default: by ours).
# GPU: a number, several with commas (one process each, through accelerate), or cpu; they count the GPUs of CUDA_VISIBLE_DEVICES where
# that is set. SYNDATA_KEY: of config/synthetic_datasets.yaml, None for real images only.

if [ -n "${BASH_VERSION:-}" ]; then
    . "$(dirname "${BASH_SOURCE[0]}")/common.sh"
else
    . "$(dirname "${(%):-%x}")/common.sh"
fi

main_cls() {
    _diffmix_usage main_cls "DATASET GPU SEED MODEL RESOLUTION NEPOCH SYNDATA_KEY GAMMA SYNTHETIC_PROB" 9 "$@" || return $?
    _diffmix_main_cls -- -1 "$@"
}

main_cls_fewshot() {
    _diffmix_usage main_cls_fewshot \
        "EXAMPLES_PER_CLASS DATASET GPU SEED MODEL RESOLUTION NEPOCH SYNDATA_KEY GAMMA SYNTHETIC_PROB" 10 "$@" || return $?
    _diffmix_main_cls -- "$@"
}

main_cls_cutmix() {
    _diffmix_usage main_cls_cutmix "DATASET GPU SEED MODEL RESOLUTION NEPOCH SYNDATA_KEY GAMMA SYNTHETIC_PROB" 9 "$@" || return $?
    _diffmix_main_cls --use_cutmix -- -1 "$@"
}

main_cls_waterbird() {
    _diffmix_usage main_cls_waterbird \
        "DATASET GPU SEED MODEL RESOLUTION NEPOCH SYNDATA_KEY GAMMA SYNTHETIC_PROB" 9 "$@" || return $?
    case "$1" in
        waterbird) _diffmix_main_cls --select_by worst_group -- -1 "$@" ;;
        *) _diffmix_main_cls --test_dataset waterbird -- -1 "$@" ;;
    esac
}

main_cls_imb() {
    _diffmix_usage main_cls_imb \
        "IMBALANCE_FACTOR DATASET GPU SEED MODEL RESOLUTION NEPOCH SYNDATA_KEY GAMMA SYNTHETIC_PROB" 10 "$@" || return $?
    local factor="$1"
    shift
    _diffmix_main_cls --task imbalanced --imbalance_factor "$factor" -- -1 "$@"
}

# The entries of CUDA_VISIBLE_DEVICES that numbers such as 0,1 stand for; where it is unset, the numbers themselves.
_diffmix_visible() {
    if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
        printf '%s\n' "$1"
        return 0
    fi
    awk -v numbers="$1" -v visible="$CUDA_VISIBLE_DEVICES" 'BEGIN {
        present = split(visible, gpus, ",")
        for (i = 1; i <= split(numbers, wanted, ","); i++) {
            if (wanted[i] !~ /^[0-9]+$/ || wanted[i] >= present) {
                print "error: GPU " wanted[i] " of " numbers ": CUDA_VISIBLE_DEVICES=" visible " shows " present ", from 0" > "/dev/stderr"
                exit 2
            }
            chosen = chosen (i > 1 ? "," : "") gpus[wanted[i] + 1]
        }
        print chosen
    }'
}

# _diffmix_main_cls [flags of the wrapper ...] -- EXAMPLES_PER_CLASS DATASET GPU ... [flags of the user, which win]
_diffmix_main_cls() {
    local extra
    extra=()
    while [ "$1" != "--" ]; do
        extra+=("$1")
        shift
    done
    shift
    local examples="$1" dataset="$2" gpu="$3" seed="$4" model="$5" resolution="$6" nepoch="$7" key="$8" gamma="$9"
    shift 9
    local probability="$1"
    shift
    set -- "$DIFFMIX_ROOT/train_cls.py" --dataset "$dataset" --recipe "$(_diffmix_recipe "$dataset")" \
        --seed "$seed" --model "$model" --res_mode "$resolution" --nepoch "$nepoch" --syndata_key "$key" --gamma "$gamma" --synthetic_prob "$probability" \
        --examples_per_class "$examples" ${extra[@]+"${extra[@]}"} "$@"
    case "$gpu" in
        *,*)
            gpu="$(_diffmix_visible "$gpu")" || return $?
            CUDA_VISIBLE_DEVICES="$gpu" "$(_diffmix_python)" -m accelerate.commands.accelerate_cli launch --quiet \
                --multi_gpu --num_machines 1 --num_processes "$(printf '%s\n' "$gpu" | tr ',' '\n' | grep -c .)" \
                --mixed_precision no --dynamo_backend no "$@"
            ;;
        *) "$(_diffmix_python)" "$1" --gpu "$gpu" "${@:2}" ;;
    esac
}
