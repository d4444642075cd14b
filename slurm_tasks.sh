# shellcheck shell=bash
# Sourced by the stages' .sh: where the project is, the site's settings, and how a stage runs as the tasks of a SLURM job,
# or, under plain bash and in the shell of a job's step, right here.  run_pipeline.sh sources it for the part up to the
# first "return" alone (DEFINE_ONLY).

usage_error() {
    echo "error: $*" >&2
    exit 2
}

# input_from SOURCE WORD…: sets ``input`` to the stage's --input, which is empty if the words, a user's flags, hold it.
input_from() {
    input=(--input "$1")
    shift
    if given --input "$@" || given -i "$@"; then input=(); fi
}

# plain NAME…: the paths in these variables as a shell would have made them of what was typed: ~ becomes a home folder,
# and white space and quotation marks around the whole are left out.  What exists under exactly its name stays.
plain() {
    local name value user home
    for name in "$@"; do
        value=${!name:-}
        [ -n "$value" ] && [ ! -e "$value" ] || continue
        value=${value#"${value%%[![:space:]]*}"} value=${value%"${value##*[![:space:]]}"}
        case $value in
        \"*\") value=${value#\"} value=${value%\"} ;;
        \'*\') value=${value#\'} value=${value%\'} ;;
        “*”) value=${value#“} value=${value%”} ;;
        esac
        case $value in
        '~' | '~/'*) value=$HOME${value#\~} ;;
        '~'*)
            user=${value%%/*}
            home=$(getent passwd "${user#\~}" | cut -d: -f6)
            [ -n "$home" ] || usage_error "$name=$value: there is no user '${user#\~}' here"
            value=$home${value#"$user"}
            ;;
        file:///*) value=${value#file://} ;;
        '$'[A-Za-z_{]* | */'$'[A-Za-z_{]*)
            usage_error "$name=$value: the shell did not put a value in place of the variable, because it is between single quotes or in a file; write the whole path, or use double quotes"
            ;;
        esac
        printf -v "$name" %s "$value"
    done
}

# ---- the package, where it is not beside the scripts
#
# In an installed package the scripts lie inside it.  `curation scripts` writes installed.sh beside the copies that it
# makes: it sets PACKAGE, SCRIPTS_VERSION and, if the user has not, PYTHON.
PACKAGE='' SCRIPTS_VERSION=''
[ -f "$PROJECT/../__init__.py" ] && [ "$(basename "$PROJECT")" = project ] && PACKAGE=$(dirname "$PROJECT")
# shellcheck disable=SC1091  # written by a command
[ -f "$PROJECT/installed.sh" ] && { source "$PROJECT/installed.sh" || exit 2; }

# ---- what a job inherits from the shell that submits it
#
# sbatch copies the environment, and from inside an allocation that is also how SLURM describes the outer job or step and
# what was asked for it.  The new job's srun and the stage would take it for their own: GPUs that this job has not, the
# outer job's memory, CPU masks, its array element (and the requeueing of that).  This is the one list of such variables,
# without their prefix SLURM_, SRUN_ or SBATCH_.  All others stay: SLURM_CONF, SLURM_CLUSTERS, account, partition, QOS,
# reservation, constraint, time limit, …
SHAPES='ARBITRARY_NODELIST|ARRAY_|CORE_SPEC|CORES?_|CPUS?_|DIST|EXACT|EXCLUSIVE|EXPORT_ENV|GPUS?$|GPUS?_|GRES|HINT|HOSTFILE'
SHAPES+='|JOB_GPUS|KILL_BAD_EXIT|LAUNCH_NODE_IPADDR|MEM_|NETWORK|NO_KILL|NPROCS|NTASKS|OVERCOMMIT|OVERLAP|OVERSUBSCRIBE'
SHAPES+='|PTY_|REMOTE_CWD|REQ_SWITCH|RESTART_COUNT|SIGNAL|SPREAD_JOB|SRUN_COMM|STEP|STD(ERR|IN|OUT)MODE|THREAD|TRES_'
SHAPES+='|USE_MIN_NODES|WAIT4SWITCH|WHOLE|WORKING_DIR'
DEVICES='CUDA_VISIBLE_DEVICES GPU_DEVICE_ORDINAL ROCR_VISIBLE_DEVICES HIP_VISIBLE_DEVICES ZE_AFFINITY_MASK'

# drop_shapes PREFIXES: unsets such variables, but for those that SLURM's record of this job confirms.
drop_shapes() {
    local name
    while read -r name; do
        [[ $name =~ ^($1)_($SHAPES) ]] || continue
        [[ $name == SLURM_* ]] && confirmed "${name#*_}" || unset "$name"
    done < <(compgen -e)
    # shellcheck disable=SC2086  # a list of words
    confirmed JOB_GPUS || unset $DEVICES
}

# SLURM's record of this job, on one line and without the fields that hold free text; empty where it is not known.
record=''
has() { [[ $record =~ \ $1 ]]; }

# Whether the record says that this job itself was given such a variable.  sbatch has then set it to this job's value.
confirmed() {
    case $1 in
    ARRAY_*) has "ArrayJobId=${SLURM_ARRAY_JOB_ID:-none} " && has "ArrayTaskId=${SLURM_ARRAY_TASK_ID:-none} " ;;
    CORE_SPEC) has 'CoreSpec=[0-9]' ;;
    CPUS_ON_NODE | CPUS_PER_TASK | NPROCS | NTASKS) has 'NumTasks=' ;;
    CPUS_PER_GPU) has 'CpusPerTres=' ;;
    GPU_BIND | TRES_BIND) has 'TresBind=' ;;
    GPU_FREQ) has 'TresFreq=' ;;
    GPUS) has 'TresPerJob=[^ ]*gpu' ;;
    GPUS_ON_NODE | JOB_GPUS) has '[A-Za-z]*(Tres|TRES)[A-Za-z]*=[^ ]*gpu' ;;
    GPUS_PER_NODE) has 'TresPerNode=[^ ]*gpu' ;;
    GPUS_PER_SOCKET) has 'TresPerSocket=[^ ]*gpu' ;;
    GPUS_PER_TASK) has 'TresPerTask=[^ ]*gpu' ;;
    MEM_PER_CPU) has 'MinMemoryCPU=[1-9]' ;;
    MEM_PER_GPU) has 'MemPerTres=' ;;
    MEM_PER_NODE) has 'MinMemoryNode=[1-9]' ;;
    NETWORK) has 'Network=[^( ]' ;;
    NTASKS_PER_GPU | NTASKS_PER_TRES) has 'NtasksPerTRES:[1-9]' ;;
    NTASKS_PER_NODE) has 'NtasksPerN:B:S:C=[1-9]' ;;
    RESTART_COUNT) has 'Restarts=[1-9]' ;;
    TRES_PER_TASK) has 'TresPerTask=' ;;
    *) false ;;
    esac
}

# Prints where this process runs: batch (a job's script), interactive (the shell of salloc), step (a task or a shell that
# srun started), or nothing if it cannot be told.  SLURM_STEP_ID may have been copied by sbatch, so the processes above
# this one are asked.
kind_of_step() {
    local pid=$$ parent words line
    while [ "${pid:-0}" -gt 1 ] && words=$(tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline"); do
        case $words in
        *"/slurm_script "* | "slurmstepd: ["*".batch]"*) echo batch && return ;;
        "slurmstepd: ["*".interactive]"* | "slurmstepd: ["*".extern]"*) echo interactive && return ;;
        "slurmstepd: ["*) echo step && return ;;
        esac
        parent=''
        while read -r line; do
            case $line in PPid:*) read -r _ parent <<<"$line" ;; esac
        done 2>/dev/null <"/proc/$pid/status"
        pid=$parent
    done
}

# Sets in_step, and drops what comes from another allocation, of which there are two signs: a step's variables in a job's
# script, and what SLURM's record of this job does not confirm.  Without a sign, the variables are left as they are.
tell_own_from_inherited() {
    local name inherited='' kind
    unset CURATION_PROGRESS CURATION_BROKEN CURATION_TIME_LEFT NOTES # an outer job's
    in_step=''
    [ -n "${SLURM_JOB_ID:-}" ] || return 0
    if [[ ${SLURM_STEP_ID:-${SLURM_STEPID:-}} =~ ^[0-9]+$ ]]; then
        kind=$(kind_of_step)
        [ "$kind" = batch ] && [ "${SLURM_STEP_ID:-$SLURM_STEPID}" != 4294967291 ] && inherited=yes
        # SLURM numbers the steps that are no srun's from 4294967290; /proc may hide its processes from users
        case $kind in '' | step) [ "${SLURM_STEP_ID:-$SLURM_STEPID}" -lt 4294967000 ] && in_step=yes && return 0 ;; esac
    fi
    record=$(timeout 10 scontrol show job "$SLURM_JOB_ID" 2>/dev/null | awk -v RS= -v FS='\n' -v id="JobId=$SLURM_JOB_ID" '
        $1 !~ "^" id " " { next }
        { sub(/ JobName=.*/, "", $1); line = " " $1
          for (i = 2; i <= NF; i++)
              if ($i !~ /^ *(Command|WorkDir|Std(Err|In|Out)|(Admin|System)?Comment|SubmitLine|Extra|MailUser)=/) line = line " " $i
          gsub(/ +/, " ", line); print line " "; exit }')
    if [ -n "$record" ]; then
        [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || confirmed ARRAY_ || inherited=yes
        [ -z "${SLURM_RESTART_COUNT:-}" ] || confirmed RESTART_COUNT || inherited=yes
        for name in GPUS GPUS_ON_NODE GPUS_PER_NODE GPUS_PER_SOCKET GPUS_PER_TASK JOB_GPUS TRES_PER_TASK \
            CPUS_PER_GPU MEM_PER_CPU MEM_PER_GPU MEM_PER_NODE NTASKS_PER_NODE; do
            name=SLURM_$name
            [ -n "${!name:-}" ] && [ "${!name}" != 0 ] && ! confirmed "${name#SLURM_}" && inherited=yes
        done
    fi
    [ -z "$inherited" ] || drop_shapes 'SLURM|SRUN'
    [[ $record =~ \ NumTasks=([0-9]+)[^\ ]*\ CPUs/Task=([0-9]+) ]] &&
        export SLURM_NTASKS=${BASH_REMATCH[1]} SLURM_NPROCS=${BASH_REMATCH[1]} SLURM_CPUS_PER_TASK=${BASH_REMATCH[2]}
    return 0
}

# Prints the version of the project's code, as receipts record it.
code_version() {
    local line version='' commit=''
    while read -r line; do
        [[ $line =~ ^__version__\ =\ \"(.*)\" ]] && version=${BASH_REMATCH[1]}
    done <"${PACKAGE:-$PROJECT/curation}/__init__.py"
    [ -e "$PROJECT/.git" ] && commit=$(git -C "$PROJECT" rev-parse --short=12 HEAD 2>/dev/null)
    echo "version ${version:-unknown}${commit:++$commit}"
}

[ -n "${DEFINE_ONLY:-}" ] && return 0

# ---- this job

PROJECT=$(cd "$PROJECT" && pwd) || exit 2
tell_own_from_inherited # before the site's own settings, which stay
[ -z "$PACKAGE" ] || [ -f "$PACKAGE/__init__.py" ] ||
    usage_error "the package that these scripts belong to is no longer in $PACKAGE: run \`curation scripts $PROJECT\` again"
version=$(code_version)
[ -z "$SCRIPTS_VERSION" ] || [ "$version" = "version $SCRIPTS_VERSION" ] ||
    usage_error "these scripts are of version $SCRIPTS_VERSION, the package is $version: run \`curation scripts $PROJECT\` again"
echo "code: $PROJECT, $version" >&2

PYTHON=${PYTHON:-$PROJECT/.venv/bin/python}
MAX_RESTARTS=${MAX_RESTARTS:-50}
WARNING_S=${WARNING_S:-180}       # so long before its end a job saves its work and queues itself again
TIME_CHECK_S=${TIME_CHECK_S:-300} # how often SLURM is asked when the job ends: that may be moved

# need NAME WHAT: a variable that must be set.  A variable whose name is nearly so, such as SRCDIR, src_dir or SRC for
# SRC_DIR, was probably meant, and the message names it.
need() {
    [ -n "${!1:-}" ] && return
    local name short near=''
    while read -r name; do
        short=${name//_/}
        short=${short^^}
        [ "$name" != "$1" ] && [ "${#short}" -ge 3 ] || continue
        case $short in "${1//_/}"*) near=$name ;; esac
        case ${1//_/} in "$short"*) near=$name ;; esac
    done < <(compgen -e)
    usage_error "$1 is not set: $2${near:+.  $near is set: was $1 meant?}"
}

# given FLAG WORD…: whether the words, a user's flags, hold this flag.  Then the script leaves its own value out, because
# a stage refuses two values for one option.
given() {
    local flag=$1 word
    shift
    for word in "$@"; do
        word=${word%%=*}
        [ "${word//-/_}" = "${flag//-/_}" ] && return 0
    done
    return 1
}

# The site's own file: module load …, source activate …, export HF_HOME=…
if [ -n "${CURATION_SETUP:-}" ]; then
    [ -r "$CURATION_SETUP" ] || usage_error "CURATION_SETUP=$CURATION_SETUP cannot be read"
    set +u # such files seldom expect it
    # shellcheck disable=SC1090  # the user's
    source "$CURATION_SETUP" || usage_error "CURATION_SETUP=$CURATION_SETUP ended with an error"
    set -u
fi
plain ROOT TARGET_DIR EDITS_DIR PROMPTS_DIR ENDPOINTS_DIR SERVER_LOGS # SRC_DIR and URLS may be several: the stage reads them

# With CURATION_WRAP, Python may be in a container, where this script cannot check it.
[ -n "${CURATION_WRAP:-}" ] || command -v "$PYTHON" >/dev/null ||
    usage_error "there is no $PYTHON: ./install.sh makes it, or name your own, as in PYTHON=/path/to/python3; an installed package has \`curation scripts FOLDER\`"

# Without srun, so many processes on this machine share the shards; stages 03, 05 and 06 start one for each GPU.
workers=()
[ -n "$in_step" ] || [ -z "${SLURM_JOB_ID:-}" ] && ! given --workers "$@" && workers=(--workers "${WORKERS:-1}")

# Words before every command, such as: apptainer exec --nv image.sif
read -r -a wrap <<<"${CURATION_WRAP:-}"

if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
    case ${SLURM_ARRAY_TASK_ID:-} in
    '' | *[!0-9]*) usage_error "SLURM_ARRAY_TASK_ID is '${SLURM_ARRAY_TASK_ID:-}', not the number of an array element" ;;
    esac
fi

# run_tasks OUTPUT COMMAND…: the command once per task of the allocation; without SLURM, once.  In a step too, once: its
# own srun would wait for the resources that the step holds.  Ends the script with the
# stage's exit code, after requeueing the job (in an array, only this element) if work is left because it reached its time
# limit or because a device has failed.  OUTPUT must be a folder that all nodes share.
run_tasks() {
    local output=$1 codes killed broken states left=''
    shift
    mkdir -p "$output" || usage_error "the folder $output cannot be made"
    cause='' step=''
    trap 'forward USR1' USR1
    if [ -n "$in_step" ] || [ -z "${SLURM_JOB_ID:-}" ]; then
        trap 'forward TERM' TERM
        trap 'forward INT' INT
        trap clear_up EXIT
        "${wrap[@]}" "$@" &
        step=$!
        wait_for_step
        [ "$code" = 69 ] && code=75 # its device has failed
        exit "$code"
    fi
    # SLURM sends TERM to the tasks too, but for scancel --batch.  srun, on TERM, would kill them; USR1 it hands on.
    trap 'forward USR1; cause=TERM' TERM
    command -v srun >/dev/null || usage_error "no srun on this node, though SLURM_JOB_ID is set; unset it to run without SLURM"

    # srun gives only the highest code of its tasks, so that 75 would hide a 2: each task writes its own down.
    notes=$(mktemp -d "$output/.job-$SLURM_JOB_ID.XXXXXX") || usage_error "the folder $output cannot be written"
    trap 'rm -rf "$notes"; clear_up' EXIT
    export NOTES=$notes CURATION_PROGRESS=$notes/progress # the stage makes that file when it finished something
    export CURATION_BROKEN=$notes/broken                  # … and broken.<node> when a device of that node has failed
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
    srun --kill-on-bad-exit=0 --export=ALL "${wrap[@]}" bash -c "$recorded" task "$@" &
    step=$!
    watch_time &
    watcher=$!
    wait_for_step
    kill "$watcher" 2>/dev/null

    codes=$(cat "$notes"/code.* 2>/dev/null | sort -un | tr '\n' ' ')
    killed=$(($(count "$notes"/task.*) - $(count "$notes"/code.*)))
    [ "$(count "$notes"/task.*)" -lt "${SLURM_NTASKS:-1}" ] && [ "$code" = 2 ] && codes="2 $codes" # did not see the folder
    [ -e "$notes/term" ] && cause=TERM
    if [ "$(count "$notes"/task.*)" = 0 ] && [ -z "$cause" ]; then
        usage_error "srun ended with $code and no task of job $SLURM_JOB_ID has started; the lines above say why"
    fi
    [ "$killed" -gt 0 ] && echo "$killed of the tasks were killed: out of memory?"
    echo "tasks ended with: ${codes:-nothing}${cause:+, asked to stop by $cause}"
    broken=$(for node in "$notes"/broken.*; do [ -e "$node" ] && echo "${node##*/broken.}"; done)
    [ -z "$broken" ] || echo "a device has failed on: ${broken//$'\n'/ }"
    case " $codes" in
    *" 2 "*) exit 2 ;;
    *" 75 "*) left=yes ;;
    *" 69 "*) # its device has failed: perhaps after the other tasks had ended, so that nobody took its shards over
        states=$("${wrap[@]}" "$@" --dry_run 2>/dev/null | tail -n 1) || true
        case " ${states##*: }," in
        ' ,' | *' pending,'* | *' waiting,'*) left=yes ;;
        *' failed,'* | *' blocked,'*) exit 1 ;;
        *) codes=${codes/69 /} ;;
        esac
        ;;
    esac
    if [ -z "$left" ]; then
        case " $codes" in ' ' | ' 0 ') [ "$killed" -eq 0 ] && exit 0 ;; esac
        exit 1
    fi

    # Work is left.  Again only at the time limit or where a device has failed (never after scancel's TERM), and only if
    # something was finished.
    if [ "$cause" = TERM ] || [ "$cause" = INT ]; then
        exit 75
    elif [ -z "$cause" ] && [ -n "$broken" ] && [ ! -e "$notes/progress" ]; then
        echo "not queued again: no device of this job has worked"
        exit 2
    elif [ -z "$cause$broken" ] && [ "$(seconds_of "$(time_left)")" -gt "$WARNING_S" ]; then
        echo "not queued again: the time limit is far"
    elif [ ! -e "$notes/progress" ] && [[ " $* " != *" --follow "* ]]; then # a follower may only have waited
        echo "not queued again: nothing was finished in the time there was"
    elif [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
        echo "not queued again: restarted ${SLURM_RESTART_COUNT:-0} times (MAX_RESTARTS)"
    else
        # shellcheck disable=SC2086  # a list of words
        queue_again $broken
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

# queue_again NODE…: without these nodes, if SLURM allows.
queue_again() {
    local job=$SLURM_JOB_ID without=''
    [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
    if ! command -v scontrol >/dev/null; then
        echo "not queued again: no scontrol on this node; submit the same command again"
        return
    fi
    [ "$#" -eq 0 ] || without=$(nodes_to_exclude "$@")
    echo "requeueing $job (restart $((${SLURM_RESTART_COUNT:-0} + 1)))${without:+ without $without}"
    rm -rf "$notes" # a requeued job is ended on the spot
    clear_up
    [ -z "$without" ] || trap '' TERM # SLURM ends the job with it, and changes only the list of a job that waits
    scontrol requeue "$job" || echo "not queued again: SLURM refused; submit the same command again"
    [ -z "$without" ] || scontrol update JobId="$job" ExcNodeList="$without" ||
        echo "SLURM did not exclude $without: the job may get the same device again"
}

# nodes_to_exclude NODE…: prints them with those that the job excludes already; nothing if too few nodes would be left.
nodes_to_exclude() {
    local others all
    all=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | awk 'match($0, / ExcNodeList=[^ ]+/) {
        list = substr($0, RSTART + 13, RLENGTH - 13); if (list != "(null)") print list; exit }')
    [ -z "$all" ] || all=$(scontrol show hostnames "$all" 2>/dev/null)
    all=$(printf '%s\n' "$@" $all | sort -u) # $all is a list of words
    others=$(sinfo --noheader --Node --partition "${SLURM_JOB_PARTITION:-}" --format %N 2>/dev/null | sort -u |
        grep -cvxF "$all")
    [ "${others:-0}" -ge "${SLURM_JOB_NUM_NODES:-1}" ] && echo "${all//$'\n'/,}"
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
