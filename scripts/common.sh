# What the wrappers share. Sourced by them; works in bash 4+ and zsh, and never ends the shell it is sourced into.

# The repository, from where this file lies. With a CDPATH, cd would look elsewhere first and print where it went; a user's own
# cd, and in zsh a hook (which -q leaves out), often list the folder.
if [ -n "${BASH_VERSION:-}" ]; then
    _diffmix_scripts="$(CDPATH='' builtin cd -- "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
else
    _diffmix_scripts="$(CDPATH='' builtin cd -q -- "$(dirname "${(%):-%x}")" && pwd)"
fi
DIFFMIX_ROOT="$(dirname "$_diffmix_scripts")"

# The python of the environment that is active; without one (conda's base is none) the repository's own where there is one, else
# the python on the path.
_diffmix_python() {
    if [ -n "${DIFFMIX_PYTHON:-}" ]; then
        printf '%s\n' "$DIFFMIX_PYTHON"
    elif [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ] && [ -x "$DIFFMIX_ROOT/.venv/bin/python" ]; then
        printf '%s\n' "$DIFFMIX_ROOT/.venv/bin/python"
    else # of an alias, command prints the definition
        unalias python python3 2>/dev/null || :
        command -v python || command -v python3
    fi
}

# The recipe of a data set: the authors' for the data sets of the paper, ours for every other; --recipe NAME overrides it.
_diffmix_recipe() {
    case "$1" in
        cub | aircraft | car | flower | dog | pet | pascal | caltech | food) printf 'paper\n' ;;
        *) printf 'default\n' ;;
    esac
}

# _diffmix_usage NAME "USAGE" WANTED "$@": whether enough words were given; says how to call NAME otherwise.
_diffmix_usage() {
    local name="$1" usage="$2" wanted="$3"
    shift 3
    if [ "$#" -ge "$wanted" ]; then
        return 0
    fi
    printf 'error: %s needs %s arguments, got %s; usage: %s %s [--flag value ...]\n' \
        "$name" "$wanted" "$#" "$name" "$usage" >&2
    return 2
}

# "bash finetune ..." as the documentation prints it: the wrappers are functions of this shell, because GPU_IDS may be an
# array and no child process inherits an array. Every other use of bash goes to bash itself.
bash() {
    case "${1:-}" in
        finetune | sample | sample_fewshot | main_cls | main_cls_fewshot | main_cls_cutmix | main_cls_imb | main_cls_waterbird)
            if [ ! -f "$1" ] && typeset -f "$1" >/dev/null; then
                "$@"
                return $?
            fi
            ;;
    esac
    command bash "$@"
}
