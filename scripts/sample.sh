# Stage 2.   source scripts/sample.sh
#            export GPU_IDS=(0 0 1 1)          one process per entry; GPU numbers or cpu; also a string: "0 0 1 1"
#            bash sample DATASET CHECKPOINT_KEY STRATEGY STRENGTH [--flag value ...]
#            bash sample_fewshot EXAMPLES_PER_CLASS DATASET CHECKPOINT_KEY STRATEGY STRENGTH [--flag value ...]
# CHECKPOINT_KEY: of config/finetuned_ckpts.yaml, None for the base model. STRENGTH: in (0, 1], or uniform.
# MULTIPLIER (5) gives the size of the subset; MODEL_NAME names another base model.

if [ -n "${BASH_VERSION:-}" ]; then
    . "$(dirname "${BASH_SOURCE[0]}")/common.sh"
else
    . "$(dirname "${(%):-%x}")/common.sh"
fi

sample() {
    _diffmix_usage sample "DATASET CHECKPOINT_KEY STRATEGY STRENGTH" 4 "$@" || return $?
    _diffmix_sample -1 "$@"
}

sample_fewshot() {
    _diffmix_usage sample_fewshot "EXAMPLES_PER_CLASS DATASET CHECKPOINT_KEY STRATEGY STRENGTH" 5 "$@" || return $?
    _diffmix_sample "$@"
}

_diffmix_sample() {
    local examples="$1" dataset="$2" key="$3" strategy="$4" strength="$5"
    shift 5
    if [ "$strength" = uniform ]; then
        set -- --strength_strategy uniform "$@"
    else
        set -- --aug_strength "$strength" "$@"
    fi
    # an array (0 0 1) and a string "0 0 1" read alike, also on several lines and whatever the user's shell separates words
    # by; no GPU_IDS: the program takes every GPU, or every CPU core
    local IFS=$' \t\n'
    local ids="${GPU_IDS[*]:-}"
    if [ -n "$ids" ]; then
        local -a list
        if [ -n "${ZSH_VERSION:-}" ]; then
            eval 'list=(${=ids})'
        else
            read -r -d '' -a list <<<"$ids" || : # to the end of the text, which is no failure
        fi
        set -- --gpu_ids "${list[@]}" "$@"
    fi
    "$(_diffmix_python)" "$DIFFMIX_ROOT/sample_mp.py" --dataset "$dataset" --recipe "$(_diffmix_recipe "$dataset")" \
        --finetune_model_key "$key" --sample_strategy "$strategy" --examples_per_class "$examples" \
        --syn_dataset_multiplier "${MULTIPLIER:-5}" \
        ${MODEL_NAME:+--model_path} ${MODEL_NAME:+"$MODEL_NAME"} "$@"
}
