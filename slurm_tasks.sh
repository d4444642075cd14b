# shellcheck shell=bash
# Sourced by the stages' .sh: where the project is, the site's settings, and how a stage runs as the tasks of a SLURM job,
# or, under plain bash, on this machine.

PYTHON=${PYTHON:-$PROJECT/.venv/bin/python}
MAX_RESTARTS=${MAX_RESTARTS:-50}
WARNING_S=${WARNING_S:-180}       # so long before its end a job saves its work and queues itself again
TIME_CHECK_S=${TIME_CHECK_S:-300} # how often SLURM is asked when the job ends: that may be moved

usage_error() {
    echo "error: $*" >&2
    exit 2
}

# need NAME WHAT: a variable that must be set.
need() {
    [ -n "${!1:-}" ] || usage_error "$1 is not set: $2"
}

# The site's own file: module load …, source activate …, export HF_HOME=…
if [ -n "${CURATION_SETUP:-}" ]; then
    [ -r "$CURATION_SETUP" ] || usage_error "CURATION_SETUP=$CURATION_SETUP cannot be read"
    set +u # such files seldom expect it
    # shellcheck disable=SC1090  # the user's
    source "$CURATION_SETUP" || usage_error "CURATION_SETUP=$CURATION_SETUP ended with an error"
    set -u
fi
# With CURATION_WRAP, Python may be in a container, where this script cannot check it.
[ -n "${CURATION_WRAP:-}" ] || command -v "$PYTHON" >/dev/null ||
    usage_error "there is no $PYTHON: ./install.sh makes it, or name your own, as in PYTHON=/path/to/python3"

# Without SLURM, so many processes on this machine share the shards; stages 03, 05 and 06 start one for each GPU.
workers=()
[ -z "${SLURM_JOB_ID:-}" ] && workers=(--workers "${WORKERS:-1}")

# Words before every command, such as: apptainer exec --nv image.sif
read -r -a wrap <<<"${CURATION_WRAP:-}"

if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
    case ${SLURM_ARRAY_TASK_ID:-} in
    '' | *[!0-9]*) usage_error "SLURM_ARRAY_TASK_ID is '${SLURM_ARRAY_TASK_ID:-}', not the number of an array element" ;;
    esac
fi

# run_tasks OUTPUT COMMAND…: the command once per task of the allocation; without SLURM, once.  Ends the script with the
# stage's exit code, after requeueing the job (in an array, only this element) if it reached its time limit with work
# left.  OUTPUT must be a folder that all nodes share.
run_tasks() {
    local output=$1 codes killed
    shift
    mkdir -p "$output" || usage_error "the folder $output cannot be made"
    cause='' step=''
    trap 'forward USR1' USR1
    if [ -z "${SLURM_JOB_ID:-}" ]; then
        trap 'forward TERM' TERM
        trap 'forward INT' INT
        trap clear_up EXIT
        "${wrap[@]}" "$@" &
        step=$!
        wait_for_step
        exit "$code"
    fi
    # SLURM sends TERM to the tasks too, but for scancel --batch.  srun, on TERM, would kill them; USR1 it hands on.
    trap 'forward USR1; cause=TERM' TERM
    command -v srun >/dev/null || usage_error "no srun on this node, though SLURM_JOB_ID is set; unset it to run without SLURM"

    # srun gives only the highest code of its tasks, so that 75 would hide a 2: each task writes its own down.
    notes=$(mktemp -d "$output/.job-$SLURM_JOB_ID.XXXXXX") || usage_error "the folder $output cannot be written"
    trap 'rm -rf "$notes"; clear_up' EXIT
    export NOTES=$notes CURATION_PROGRESS=$notes/progress # the stage makes that file when it finished something
    export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}} # srun does not take it from the job
    CURATION_TIME_LEFT=$(time_left)
    export CURATION_TIME_LEFT
    # shellcheck disable=SC2016  # expanded by the task's own bash
    local recorded='
        me=${SLURM_PROCID:-0}
        trap : USR1 USR2 INT; trap ": >\"$NOTES/term\"" TERM
        if ! : >"$NOTES/task.$me"; then
            echo "error: node $(hostname) does not see $NOTES: the output must be on a filesystem that all nodes share" >&2
            exit 2
        fi
        "$@"; code=$?
        echo "$code" >"$NOTES/code.$me"; exit "$code"'
    srun --kill-on-bad-exit=0 "${wrap[@]}" bash -c "$recorded" task "$@" &
    step=$!
    watch_time &
    watcher=$!
    wait_for_step
    kill "$watcher" 2>/dev/null

    codes=$(cat "$notes"/code.* 2>/dev/null | sort -un | tr '\n' ' ')
    killed=$(($(count "$notes"/task.*) - $(count "$notes"/code.*)))
    [ "$(count "$notes"/task.*)" -lt "${SLURM_NTASKS:-1}" ] && [ "$code" = 2 ] && codes="2 $codes" # did not see the folder
    [ -e "$notes/term" ] && cause=TERM
    [ "$killed" -gt 0 ] && echo "$killed of the tasks were killed: out of memory?"
    echo "tasks ended with: ${codes:-nothing}${cause:+, asked to stop by $cause}"
    case " $codes" in
    *" 2 "*) exit 2 ;;
    *" 75 "*) ;;
    " 0 ") [ "$killed" -eq 0 ] && exit 0 || exit 1 ;;
    *) exit 1 ;;
    esac

    # Work is left.  Again only at the time limit (never after scancel's TERM), and only if something was finished.
    if [ "$cause" = TERM ] || [ "$cause" = INT ]; then
        exit 75
    elif [ -z "$cause" ] && [ "$(seconds_of "$(time_left)")" -gt "$WARNING_S" ]; then
        echo "not queued again: the time limit is far"
    elif [ ! -e "$notes/progress" ] && [[ " $* " != *" --follow "* ]]; then # a follower may only have waited
        echo "not queued again: nothing was finished in the time there was"
    elif [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
        echo "not queued again: restarted ${SLURM_RESTART_COUNT:-0} times (MAX_RESTARTS)"
    else
        queue_again
    fi
    exit 75
}

# This runs at the end of a script, however it ends; a script may redefine it.
clear_up() { :; }

forward() {
    cause=${cause:-$1}
    [ -n "$step" ] && kill -s "$1" "$step" 2>/dev/null
}

# Sets ``code``.  A trapped signal interrupts wait but does not end the process.
wait_for_step() {
    while kill -0 "$step" 2>/dev/null; do wait "$step"; done
    wait "$step"
    code=$?
}

count() {
    [ -e "$1" ] && echo $# || echo 0
}

queue_again() {
    local job=$SLURM_JOB_ID
    [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
    if ! command -v scontrol >/dev/null; then
        echo "not queued again: no scontrol on this node; submit the same command again"
        return
    fi
    echo "requeueing $job (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
    rm -rf "$notes" # a requeued job is ended on the spot
    clear_up
    scontrol requeue "$job" || echo "not queued again: SLURM refused; submit the same command again"
}

# Prints the time left for the job, [days-]hours:minutes:seconds; nothing if SLURM does not answer.
time_left() {
    timeout 10 squeue --noheader --jobs "$SLURM_JOB_ID" --format %L 2>/dev/null | head -n 1
}

# Converts such a text to seconds; an empty text gives a very large number.
seconds_of() {
    awk -v text="$1" 'BEGIN {
        if (text !~ /^([0-9]+-)?([0-9]+:)*[0-9]+$/) { print 999999999; exit }
        days = 0; if (split(text, halves, "-") == 2) { days = halves[1]; text = halves[2] }
        n = split(text, part, ":"); total = 0
        for (i = 1; i <= n; i++) total = total * 60 + part[i]
        print days * 86400 + total }'
}

# Sends the warning of --signal=B:USR1@180 itself if the job ends earlier than SLURM said at first.
watch_time() {
    local nap=
    trap - USR1 INT EXIT
    trap 'kill "$nap" 2>/dev/null; exit' TERM
    while true; do
        sleep "$TIME_CHECK_S" &
        nap=$!
        wait "$nap"
        if [ "$(seconds_of "$(time_left)")" -le "$WARNING_S" ]; then
            kill -s USR1 $$
            return
        fi
    done
}
