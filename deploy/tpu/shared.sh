# For launch_tpu.sh and its back-ends: running or printing commands, the meaning of failures, the types of TPUs.
# shellcheck shell=bash

errors=''    # stderr of the last command
made=()      # what this call has made so far, printed if it fails
stuck=()     # what could not be removed
removed=0

dry() { [ "$DRY_RUN" = 1 ]; }

# A message for people: on stderr, or in a dry run as a comment between the commands.
note() { if dry; then printf '# %s\n' "$*"; else printf '%s\n' "$*" >&2; fi; }

refuse() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

fail() {
    printf 'error: %s\n' "$*" >&2
    if [ "${#made[@]}" -gt 0 ]; then
        local list
        printf -v list '%s, ' "${made[@]}"
        printf 'left over: %s; "./launch_tpu.sh down" with the same settings removes what "up" made\n' "${list%, }" >&2
    fi
    exit 1
}

# Words, quoted for a shell.
quoted() {
    local word words=()
    for word; do
        if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then words+=("$word"); else words+=("'${word//\'/\'\\\'\'}'"); fi
    done
    printf '%s' "${words[*]}"
}

# Two commands with :: between them, as the arrays `first` and `second`.
split() {
    first=()
    while [ "$1" != :: ]; do first+=("$1") && shift; done
    second=("${@:2}")
}

# Run a command; its stderr is shown at once and kept in `errors`.
attempt() {
    local code=0 kept
    kept=$(mktemp)
    { "$@" 2>&1 >&3 3>&- | tee "$kept" >&2; } 3>&1 || code=$?
    errors=$(<"$kept")
    rm -f "$kept"
    return "$code"
}

call() {
    if dry; then
        printf '%s\n' "$(quoted "$@")"
    else
        attempt "$@" || fail "$(meaning "$?" "$@")"
    fi
}

# Show something that may not exist.
look() { if dry; then call "$@"; else "$@" || true; fi; }

# Like `call`, but the command may fail.
try() { if dry; then printf '%s || true\n' "$(quoted "$@")"; else "$@" >/dev/null 2>&1 || true; fi; }

# Replace this program by a command, which gets the terminal.
take_over() { if dry; then call "$@"; else exec "$@"; fi; }

# Print what a command prints, or nothing if it fails. In a dry run print the command itself, for use in a loop.
query() { if dry; then quoted "$@"; else "$@" 2>/dev/null || true; fi; }

ssh_lost() { [[ $errors =~ "status 255"|"code [255]"|"onnection timed out"|"onnection refused" ]]; }

# A command on workers, tried again if ssh fails: a new machine refuses connections at first, and connections break.
through() {
    local tries=1
    if dry; then
        call "$@"
        return
    fi
    until attempt "$@"; do
        if ! ssh_lost || [ "$tries" -ge 5 ]; then fail "$(meaning 1 "$@")"; fi
        note "ssh could not connect; trying again in $POLL_SECONDS s ($tries of 5)"
        tries=$((tries + 1))
        sleep "$POLL_SECONDS"
    done
}

# The state to report when a query failed: gone, or unknown because there was no connection.
unanswered() {
    case $1 in
    *NOT_FOUND* | *NotFound* | *"was not found"* | *code=404* | *SERVICE_DISABLED*) echo "GONE (there is none)" ;;
    *) echo "UNKNOWN (${1##*$'\n'})" ;;
    esac
}

# Query a state: `answer` is what the command prints, without its warnings, or why it failed.
ask() {
    local kept code=0
    kept=$(mktemp)
    answer=$("$@" 2>"$kept") || code=$?
    [ "$code" = 0 ] || answer=$(unanswered "$(<"$kept")")
    rm -f "$kept"
    return "$code"
}

# piped COMMAND :: COMMAND
piped() {
    split "$@"
    if dry; then
        printf '%s | %s\n' "$(quoted "${first[@]}")" "$(quoted "${second[@]}")"
    else
        "${first[@]}" | attempt "${second[@]}" || fail "$(meaning "$?" "${second[@]}")"
    fi
}

# secretly NAME COMMAND: the command reads the variable's value from stdin; it is printed nowhere.
secretly() {
    local name=$1
    shift
    if dry; then
        printf 'printf %%s "$%s" | %s\n' "$name" "$(quoted "$@")"
    else
        printf %s "${!name}" | attempt "$@" || fail "$(meaning "$?" "$@")"
    fi
}

# ensure WHAT QUESTION :: COMMAND: make something unless it exists.
ensure() {
    local what=$1 code
    split "${@:2}"
    if dry; then
        printf '%s >/dev/null 2>&1 || %s\n' "$(quoted "${first[@]}")" "$(quoted "${second[@]}")"
    elif "${first[@]}" >/dev/null 2>&1; then
        note "$what exists already"
    else
        note "creating $what"
        code=0
        attempt "${second[@]}" || code=$?
        if [ "$code" = 0 ] || "${first[@]}" >/dev/null 2>&1; then made+=("$what"); fi
        [ "$code" = 0 ] || fail "$what: $(meaning "$code" "${second[@]}")"
    fi
}

# remove WHAT QUESTION :: COMMAND: remove something if it exists. After a failure the other removals still run.
remove() {
    local what=$1 said
    split "${@:2}"
    if dry; then
        printf 'if %s >/dev/null 2>&1; then %s; fi\n' "$(quoted "${first[@]}")" "$(quoted "${second[@]}")"
    elif said=$("${first[@]}" 2>&1); then
        note "removing $what"
        removed=$((removed + 1))
        attempt "${second[@]}" || stuck+=("$what ($(meaning "$?" "${second[@]}"))")
    elif [[ $(unanswered "$said") != GONE* ]]; then
        errors=$said
        stuck+=("$what, if it exists ($(meaning 1 "${first[@]}"))")
    fi
}

# What a failure means and what to do, from the exit status and the command's stderr in `errors`.
meaning() {
    local code=$1 quotas="https://console.cloud.google.com/iam-admin/quotas?project=$PROJECT"
    shift
    case $errors in
    *[Qq]uota*)
        echo "no quota for $TYPE in $ZONE. Ask for it at $quotas (spot TPUs have a separate, preemptible quota)," \
            "or choose another TYPE, ZONE or SPOT" ;;
    *RESOURCE_POOL_EXHAUSTED* | *STOCKOUT* | *"more capacity"* | *"enough resources"* | *"nsufficient capacity"*)
        echo "no $TYPE is free in $ZONE now. Try again later, or another ZONE, a smaller TYPE, or a RESERVATION" ;;
    *SERVICE_DISABLED* | *"has not been used in project"*)
        echo "an API is off in $PROJECT. ./launch_tpu.sh up turns on the APIs that it needs; this takes some minutes" ;;
    *"active account"* | *"auth login"* | *eauthentication*)
        echo "gcloud has no valid login: gcloud auth login" ;;
    *"Permission denied on 'locations"* | *"nknown zone"* | *"zones/$ZONE' was not found"* | *"ccelerator type"*)
        echo "$ZONE has no $TYPE, or is no zone. List zones with gcloud compute tpus locations list" \
            "--project=$PROJECT, and their types with gcloud compute tpus accelerator-types list --zone=ZONE" \
            "--project=$PROJECT" ;;
    *"ervice account"*"does not exist"*)
        echo "a new service account is not known everywhere yet: wait a minute and repeat the command" ;;
    *PERMISSION_DENIED* | *"not have permission"*)
        echo "this login may not do that in $PROJECT. Ask the project's owner for the roles that docs/tpu.md lists" ;;
    *)
        if ssh_lost; then
            echo "ssh could not connect. Check that a firewall rule allows port 22, or use the proxy with IAP=1;" \
                "what runs on the workers continues"
        else
            echo "$(quoted "${@:1:6}") ... failed with status $code; its output is above"
        fi ;;
    esac
}

# --------------------------------------------------------------------------------------------------------------- types

# The shape of a slice with this number of chips: a 2D torus for v5e and v6e, a 3D torus for v5p and tpu7x.
shape() {
    case $1-$2 in
    2d-1) echo 1x1 ;; 2d-4) echo 2x2 ;; 2d-8) echo 2x4 ;; 2d-16) echo 4x4 ;; 2d-32) echo 4x8 ;; 2d-64) echo 8x8 ;;
    2d-128) echo 8x16 ;; 2d-256) echo 16x16 ;;
    3d-4) echo 2x2x1 ;; 3d-8) echo 2x2x2 ;; 3d-16) echo 2x2x4 ;; 3d-32) echo 2x4x4 ;; 3d-64) echo 4x4x4 ;;
    3d-128) echo 4x4x8 ;; 3d-256) echo 4x8x8 ;; 3d-512) echo 8x8x8 ;; 3d-1024) echo 8x8x16 ;;
    esac
}

# Set what the back-ends need to know about TYPE. v5p and tpu7x count cores, two per chip; v5e and v6e count chips.
read_type() {
    local number=${TYPE#*-} kind sizes
    [[ $TYPE =~ ^(v5p|v5e|v5litepod|v6e|tpu7x)-[1-9][0-9]{0,3}$ ]] ||
        refuse "TYPE=$TYPE is none of v5p-N, v6e-N, v5e-N and tpu7x-N; choose one, say TYPE=v5p-64 or TYPE=v6e-64"
    generation=${TYPE%-*} accelerator=$TYPE chips=$number
    case $generation in
    v5p) kind=3d chips=$((number / 2)) runtime=v2-alpha-tpuv5 machine=ct5p-hightpu gke_type=tpu-v5p-slice ;;
    tpu7x) kind=3d chips=$((number / 2)) runtime='' machine=tpu7x-standard gke_type=tpu7x ;;
    v6e) kind=2d runtime=v2-alpha-tpuv6e machine=ct6e-standard gke_type=tpu-v6e-slice ;;
    v5e | v5litepod)
        generation=v5e accelerator=v5litepod-$number
        kind=2d runtime=v2-alpha-tpuv5-lite machine=ct5lp-hightpu gke_type=tpu-v5-lite-podslice ;;
    esac
    topology=$(shape "$kind" "$chips")
    sizes='1, 4, 8, 16, 32, 64, 128 and 256'
    [ "$kind" = 2d ] || sizes='8, 16, 32, 64, 128, 256, 512, 1024 and 2048'
    [ -n "$topology" ] && { [ "$kind" = 2d ] || [ $((number % 2)) = 0 ]; } ||
        refuse "TYPE=$TYPE: sizes of $generation are $sizes"
    # Slices of v5e and v6e with at most 8 chips are one machine; all others have four chips on each machine.
    chips_per_host=4
    if [ "$kind" = 2d ] && [ "$chips" -le 8 ]; then chips_per_host=$chips; fi
    hosts=$((chips / chips_per_host))
    machine=$machine-${chips_per_host}t
    image_family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e
    [ "$generation" != tpu7x ] || image_family=ubuntu-accel-2404-amd64-tpu-tpu7x
    [ -z "$RUNTIME" ] || runtime=$RUNTIME
}
