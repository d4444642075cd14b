#!/bin/bash
# Runs stages 01 to 04.  On a cluster it submits them as jobs that depend on each other; without sbatch it runs them
# here, one after the other.  Run it as often as you like: finished shards are not done again.
#
#     SRC_DIR=/path/to/shards ROOT=/path/to/root ./run_pipeline.sh [--follow] [--stages 02-04] [--here] [--dry_run] [-- FLAGS]
#
#     --follow         a stage starts as soon as the previous one runs, and processes its shards as they are published
#     --stages 02-04   only these: one (03) or a range; by default 01-04
#     --here           run them here, even if there is sbatch: inside an allocation, for a few shards
#     --dry_run        print the commands, and do nothing
#     -- FLAGS         flags for every stage, such as --quiet or --shards 00000000..00000099
#
# Variables:
#     SRC_DIR                     the source shards: a folder, a glob, braces or a list file (stages 01 and 04)
#     ROOT                        receives captions/, prompts/, edits/ and shards/ (the hybrid shards)
#     ARRAY_01 … ARRAY_04         the stage as a job array: ARRAY_01=0-9, ARRAY_03=0-63%16
#     SBATCH_01 … SBATCH_04       further words for its sbatch: SBATCH_01='--partition=cpu --time=01:00:00'
#     FLAGS_01 … FLAGS_04         further flags of the stage: FLAGS_01='--detector scrfd'
#     ENDPOINTS_DIR, ENDPOINTS or PORTS: the model servers of stage 02; without one it starts its own on its GPUs
# SBATCH_*, FLAGS_* and FLAGS are words between spaces; no shell looks at them.  docs/slurm.md has all other variables.
#
# A stage starts when the previous one has ended, with any exit code: a failed shard does not stop the others.  The script
# ends with 0 if all jobs were submitted, with 2 if one could not be.  Without sbatch it stops at a stage that ends with 2
# or 75, continues after a 1 (some shards failed), and ends with the worst exit code.
set -u

# sbatch runs a copy of this file; SLURM knows the original's path, which it shows with the flags behind it
PROJECT=${CURATION_HOME:-$(dirname "$(readlink -f "$0")")}
if [ -z "${CURATION_HOME:-}" ] && [ ! -f "$PROJECT/slurm_tasks.sh" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    PROJECT=$(scontrol show job "$SLURM_JOB_ID" | sed -nE 's#^ +Command=(.*)/[a-z0-9_]+\.sh( .*)?$#\1#p' | head -n 1)
    PROJECT=$(cd "${SLURM_SUBMIT_DIR:-.}" && cd "${PROJECT:-.}" && pwd)
fi

[ -f "$PROJECT/slurm_tasks.sh" ] || { echo "error: the project is not in '$PROJECT': set CURATION_HOME to its folder" >&2 && exit 2; }
PROJECT=$(cd "$PROJECT" && pwd) || exit 2
DEFINE_ONLY=yes source "$PROJECT/slurm_tasks.sh"

SCRIPTS=(01_filter_noface.sh 02_captions_processor.sh 03_generate_images.sh 04_reshard.sh)
PLANS=(captions/_plan/01_filter_noface prompts/_plan/02_captions_processor edits/_plan/03_generate_images)
follow='' dry_run='' here='' stages=01-04
while [ $# -gt 0 ]; do
    case $1 in
    --follow) follow=yes ;;
    --here) here=yes ;;
    --dry_run | --dry-run) dry_run=yes ;;
    --stages=*) stages=${1#*=} ;;
    --stages)
        [ $# -gt 1 ] || usage_error "--stages needs a value, such as 02-04"
        stages=$2
        shift
        ;;
    -h | --help)
        sed -n '2,/^set -u/{/^#/!d;s/^# \{0,1\}//;p}' "$0"
        exit 0
        ;;
    --)
        shift
        break
        ;;
    *) usage_error "no such option: $1; flags of the stages come after --, or in FLAGS_01 … FLAGS_04" ;;
    esac
    shift
done
all_flags=("$@")

[[ $stages =~ ^0?([1-4])((-|\.\.|:)0?([1-4]))?$ ]] || usage_error "--stages $stages: write one of 01 to 04, or a range such as 02-04"
first=${BASH_REMATCH[1]} last=${BASH_REMATCH[4]:-${BASH_REMATCH[1]}}
[ "$first" -le "$last" ] || usage_error "--stages $stages: the range runs backwards"

plain ROOT ENDPOINTS_DIR
[ -n "${ROOT:-}" ] || usage_error "ROOT is not set: the folder that takes captions/, prompts/, edits/ and shards/"
ROOT=$(realpath -m -- "$ROOT") || exit 2
if [ "$first" = 1 ] || [ "$last" = 4 ]; then
    [ -n "${SRC_DIR:-}" ] || usage_error "SRC_DIR is not set: the source shards"
    plain SRC_DIR
    case $SRC_DIR in
    *[*?[{]* | *://* | pipe:*) ;; # a glob, braces, a URL or a command
    *)
        sources=("$SRC_DIR") # or several, with white space or commas between them
        [ -e "$SRC_DIR" ] || IFS=$' \t\n,' read -r -d '' -a sources <<<"$SRC_DIR"
        for source in "${sources[@]}"; do
            plain source
            [ -e "$source" ] || usage_error "SRC_DIR=$SRC_DIR is not there"
        done
        ;;
    esac
    [[ $SRC_DIR -ef $ROOT/shards ]] && usage_error "SRC_DIR is $ROOT/shards, which takes the hybrid shards: choose another ROOT"
fi
for n in 1 2 3 4; do
    array=ARRAY_0$n
    [[ ${!array:-0} =~ ^[0-9]+([-:,][0-9]+)*(%[0-9]+)?$ ]] || usage_error "$array=${!array}: write it as sbatch --array, as in 0-9 or 0-63%16"
done
if [ -n "${ENDPOINTS_DIR:-}" ] && [ "$first" -le 2 ] && [ "$last" -ge 2 ]; then
    ENDPOINTS_DIR=$(realpath -m -- "$ENDPOINTS_DIR")
    export ENDPOINTS_DIR
fi

# words_of NAME: sets ``words`` to those of a variable.
words_of() {
    words=()
    IFS=$' \t\n' read -r -d '' -a words <<<"${!1:-}"
    return 0
}

# stage_words N: sets ``stage`` to the stage's flags and ``place`` to its variables.  SRC_DIR and the folders have another
# meaning for each stage, so it gets ROOT and derives its own folders.
stage_words() {
    words_of "FLAGS_0$1"
    stage=("${all_flags[@]}" "${words[@]}")
    place=(env -u TARGET_DIR -u EDITS_DIR -u PROMPTS_DIR)
    case $1 in 2 | 3) place+=(-u SRC_DIR) ;; *) place+=("SRC_DIR=$SRC_DIR") ;; esac
    place+=("ROOT=$ROOT" "CURATION_HOME=$PROJECT")
}

show() { printf '%q ' "$@" && echo; }

how_to_look() {
    printf 'how far it is:  cd %q && %q -m curation status %q\n' "$PROJECT" "${PYTHON:-$PROJECT/.venv/bin/python}" "$ROOT"
}

# ---- on a cluster

# sbatch_words N: sets ``submit``.  What SBATCH_0N says comes last, and so goes before what is said here.
sbatch_words() {
    local array=ARRAY_0$1 kind=afterany element=
    submit=(sbatch --parsable --kill-on-invalid-dep=yes)
    [ -n "${SBATCH_OUTPUT:-}" ] || submit+=(--output="${PROJECT//%/%%}/logs/%x-%j.log")
    [ -n "${!array:-}" ] && submit+=(--array="${!array}")
    if [ -n "$before" ]; then
        if [ -n "$follow" ]; then
            kind=after
            array=ARRAY_0$(($1 - 1)) # all of an array may never run at once: its first element is enough
            element=${!array:+_${!array%%[!0-9]*}}
            # an earlier run's list of shards looks complete until the new run has made it longer: give it a minute
            [ -e "$ROOT/${PLANS[$1 - 2]}" ] && element+=+1
        fi
        submit+=(--dependency="$kind:$before$element")
    fi
    [ "$1" = 2 ] && [ -n "${ENDPOINTS_DIR:-}${ENDPOINTS:-}${PORTS:-}" ] && submit+=(--gpus-per-node=0)
    words_of "SBATCH_0$1"
    submit+=("${words[@]}" "$PROJECT/${SCRIPTS[$1 - 1]}")
}

if [ -z "$here" ] && command -v sbatch >/dev/null; then
    case ,${SBATCH_EXPORT:-ALL}, in
    *,ALL,*) ;;
    *) usage_error "SBATCH_EXPORT=$SBATCH_EXPORT keeps the variables from the jobs: unset it" ;;
    esac
    [ -z "${SLURM_JOB_ID:-}" ] || drop_shapes 'SLURM|SRUN|SBATCH' # of the allocation in which this script was started
    [ -n "$dry_run" ] || mkdir -p "$PROJECT/logs" "$ROOT" || usage_error "$PROJECT/logs or $ROOT cannot be made"
    before='' jobs=()
    for ((n = first; n <= last; n++)); do
        stage_words "$n"
        sbatch_words "$n"
        [ -n "$before" ] && [ -n "$follow" ] && stage+=(--follow)
        if [ -n "$dry_run" ]; then
            show "${place[@]}" "${submit[@]}" "${stage[@]}"
            before=JOB_0$n
            continue
        fi
        if ! before=$("${place[@]}" "${submit[@]}" "${stage[@]}"); then
            [ ${#jobs[@]} -gt 0 ] && echo "submitted before: ${jobs[*]}; scancel ${jobs[*]} takes them back" >&2
            usage_error "sbatch did not take stage 0$n: $(show "${submit[@]}" "${stage[@]}")"
        fi
        before=${before%%;*} # the cluster's name may follow
        jobs+=("$before")
        echo "stage 0$n is job $before"
    done
    how_to_look
    exit 0
fi

# ---- on one machine

[ -n "$follow" ] && echo "--follow is for a cluster: here a stage starts when the one before has ended" >&2

# A stage has its own process group, in which signals are not ignored; this script forwards its signals to it.
child='' asked=''
forward() {
    asked=yes
    [ -n "$child" ] && kill -s "$1" "$child" 2>/dev/null
}
trap 'forward INT' INT
trap 'forward USR1' USR1
trap 'forward TERM' TERM HUP

worst=0
for ((n = first; n <= last; n++)); do
    stage_words "$n"
    command=("${place[@]}" bash "$PROJECT/${SCRIPTS[n - 1]}" "${stage[@]}")
    if [ -n "$dry_run" ]; then
        show "${command[@]}"
        continue
    fi
    [ -n "$asked" ] && exit 75
    echo "stage 0$n: ${SCRIPTS[n - 1]}"
    set -m
    "${command[@]}" &
    child=$!
    set +m
    while kill -0 "$child" 2>/dev/null; do wait "$child"; done
    wait "$child"
    code=$?
    child=''
    echo "stage 0$n ended with $code"
    case $code in
    0) ;;
    1) worst=1 ;;
    *)
        how_to_look
        exit "$code"
        ;;
    esac
done
[ -n "$dry_run" ] || how_to_look
exit "$worst"
