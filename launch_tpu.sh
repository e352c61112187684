#!/usr/bin/env bash
# Start a training run on TPUs in an empty Google Cloud project. See ./launch_tpu.sh --help and docs/tpu.md.
set -euo pipefail
shopt -s lastpipe # the last command of a pipe may set variables
cd "$(dirname "${BASH_SOURCE[0]}")"

# shellcheck source=deploy/tpu/shared.sh
source deploy/tpu/shared.sh
# shellcheck source=deploy/tpu/queued.sh
source deploy/tpu/queued.sh
# shellcheck source=deploy/tpu/mig.sh
source deploy/tpu/mig.sh
# shellcheck source=deploy/tpu/gke.sh
source deploy/tpu/gke.sh

help() {
    cat <<'END'
./launch_tpu.sh VERB [SETTING=value ...] [key=value ...]

    up       create the bucket, service account, secrets and TPU of a run, and wait for the TPU
    run      send the code of HEAD, train or evaluate on all workers, and watch; restart after a preemption
    watch    watch a run that was started before, as "run" does
    logs     the last log lines of each worker, from the bucket; "logs follow" follows the log of one worker
    ssh      a shell on one worker
    status   the state of the TPU and of each worker
    down     remove everything that "up" made except the bucket, which holds the run

key=value words in lower case are arguments of python -m retool_jax.COMMAND. The bucket is mounted at /mnt/retool on
every worker, and the folder runs/ of the command is gs://BUCKET/runs:
    ./launch_tpu.sh up  PROJECT=my-project ZONE=us-east5-a TYPE=v5p-64
    ./launch_tpu.sh run PROJECT=my-project ZONE=us-east5-a TYPE=v5p-64 config=grpo_qwen2.5_32b rl.steps=150

Settings, as arguments or as environment variables:
    PROJECT            the Google Cloud project
    ZONE               the zone, such as us-east5-a
    TYPE=v5p-64        the slice: v5p-N and tpu7x-N count cores (two per chip), v6e-N and v5e-N count chips
    SLICES=1           the number of slices
    COMMAND=train      what "run" starts: train or evaluate
    NAME=retool        the name of the run and its resources: lower-case letters, digits and -, at most 20 characters
    BACKEND=queued     queued: queued resources (v5p, v6e, v5e); mig: managed instance groups (v5p, v6e, tpu7x);
                       gke: a Kubernetes cluster (all)
    BUCKET             holds code, runs, checkpoints, logs and compiled programs; default PROJECT-retool
    SPOT=1             1: spot; 0: on demand, at the full price and without preemption
    RESERVATION        the name of a reservation, to use instead of SPOT
    MAX_REQUEUES=10    how often to request a preempted TPU again; on GKE, how often to restart a failed job
    MAX_WAIT_MINUTES=1440   how long to wait for a TPU
    POLL_SECONDS=60    the time between two checks
    RUNTIME            queued: the image of the machines; the default depends on TYPE
    NETWORK=default    the network of the machines
    CLUSTER            gke: an existing cluster to use; by default "up" makes one and "down" removes it
    IMAGE=python:3.12-bookworm   gke: the container image
    PYTHON_VERSION=3.12   the Python of the workers
    PINNED_AT          packages released after this time are not installed; default: the time of the commit
    UV_VERSION=0.13.9   the release of uv, which installs the packages
    RUNSC_RELEASE=20261005   the release of gVisor
    SECRETS="HF_TOKEN WANDB_API_KEY"   environment variables for the training; "up" stores those that are set here
    WORKER=0           for ssh and logs follow: WORKER or SLICE/WORKER
    IAP=0              1: ssh through the Identity-Aware Proxy, for machines without an open port
    ALLOW_DIRTY=0      1: send HEAD even if there are uncommitted changes
    DRY_RUN=0          1: print the commands, to read or to paste, and run none
END
}

# The defaults. An empty default is computed later, or the setting must be given.
settings=(PROJECT= ZONE= TYPE=v5p-64 SLICES=1 COMMAND=train NAME=retool BACKEND=queued BUCKET= SPOT= RESERVATION=
    MAX_REQUEUES=10 MAX_WAIT_MINUTES=1440 POLL_SECONDS=60 RUNTIME= NETWORK=default CLUSTER= IMAGE=python:3.12-bookworm
    PYTHON_VERSION=3.12 PINNED_AT= UV_VERSION=0.13.9 RUNSC_RELEASE=20261005 SECRETS="HF_TOKEN WANDB_API_KEY" WORKER=0
    IAP=0 ALLOW_DIRTY=0 DRY_RUN=0)

read_words() {
    local setting name word names=' '
    for setting in "${settings[@]}"; do
        name=${setting%%=*}
        names+="$name "
        declare -g "$name=${!name-${setting#*=}}"
    done
    run_words=()
    for word; do
        case $word in
        --) ;;
        [A-Z]*=*)
            [[ $names == *" ${word%%=*} "* ]] || refuse "${word%%=*} is no setting; the settings are:$names"
            declare -g "$word" ;;
        *=* | follow) run_words+=("$word") ;;
        *) refuse "$word is neither SETTING=value nor key=value for the run; see ./launch_tpu.sh --help" ;;
        esac
    done
}

check_settings() {
    local name
    for name in PROJECT ZONE; do
        [ -n "${!name}" ] || refuse "$name is not set; add $name=..., as an argument or in the environment"
    done
    for name in SLICES MAX_REQUEUES MAX_WAIT_MINUTES POLL_SECONDS; do
        [[ ${!name} =~ ^[0-9]+$ ]] || refuse "$name=${!name} is no number"
    done
    [ "$SLICES" -gt 0 ] || refuse "SLICES=$SLICES: a run has at least one slice"
    [[ $NAME =~ ^[a-z][a-z0-9-]{0,18}[a-z0-9]$ ]] ||
        refuse "NAME=$NAME: a name has 2 to 20 lower-case letters, digits and -, and begins with a letter"
    [[ $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z0-9]+$ ]] ||
        refuse "ZONE=$ZONE is no zone; us-east5-a is a zone, us-east5 a region"
    [[ $COMMAND =~ ^(train|evaluate)$ ]] || refuse "COMMAND=$COMMAND is neither train nor evaluate"
    [[ $BACKEND =~ ^(queued|mig|gke)$ ]] || refuse "BACKEND=$BACKEND is none of queued, mig and gke"
    [ -z "$RESERVATION" ] || [ "$SPOT" != 1 ] ||
        refuse "SPOT=1 and RESERVATION=$RESERVATION exclude each other; set one"
    [ -n "$SPOT" ] || SPOT=$([ -n "$RESERVATION" ] && echo 0 || echo 1)
    for name in SPOT IAP ALLOW_DIRTY DRY_RUN; do
        [[ ${!name} =~ ^[01]$ ]] || refuse "$name=${!name} is neither 0 nor 1"
    done
    [[ $WORKER =~ ^([0-9]+/)?[0-9]+$ ]] || refuse "WORKER=$WORKER is neither a number nor SLICE/WORKER"
    [[ $WORKER == */* ]] || WORKER=0/$WORKER
    BUCKET=${BUCKET:-$PROJECT-retool}
    BUCKET=${BUCKET#gs://}
    REGION=${ZONE%-*}
    run_url=gs://$BUCKET/$NAME
    account=tpu-$NAME@$PROJECT.iam.gserviceaccount.com
    tunnel=()
    [ "$IAP" = 0 ] || tunnel=(--tunnel-through-iap)
    read_type
    "${BACKEND}_check"
}

check_login() {
    dry || command -v gcloud >/dev/null ||
        refuse "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
    if dry; then
        call gcloud auth list --filter=status:ACTIVE '--format=value(account)'
    else
        [ -n "$(query gcloud auth list --filter=status:ACTIVE '--format=value(account)')" ] ||
            refuse "gcloud has no login: gcloud auth login"
    fi
}

# -------------------------------------------------------------------------------------------------------- up and down

secret_name() { printf '%s-%s' "$NAME" "$(tr '[:upper:]_' '[:lower:]-' <<<"$1")"; }

apis() {
    local names=(compute storage secretmanager iam)
    case $BACKEND in queued) names+=(tpu) ;; gke) names+=(container) ;; esac
    printf '%s.googleapis.com\n' "${names[@]}"
}

store_secrets() {
    local variable object
    for variable in $SECRETS; do
        object=$(secret_name "$variable")
        if [ -z "${!variable-}" ]; then
            note "$variable is not set here: the training gets the value that was stored before, if there is one"
        elif [ "$BACKEND" = gke ]; then
            gke_store "$variable" "$object"
        else
            ensure "secret $object" gcloud secrets describe "$object" --project="$PROJECT" :: \
                gcloud secrets create "$object" --project="$PROJECT" --quiet --replication-policy=automatic
            secretly "$variable" gcloud secrets versions add "$object" --project="$PROJECT" --quiet --data-file=-
            call gcloud secrets add-iam-policy-binding "$object" --project="$PROJECT" --quiet \
                --member="serviceAccount:$account" --role=roles/secretmanager.secretAccessor
        fi
    done
}

up() {
    local names
    trap 'fail interrupted' INT
    mapfile -t names < <(apis)
    call gcloud services enable "${names[@]}" --project="$PROJECT" --quiet
    # Checkpoints need folders that can be renamed in one step, so the bucket has a hierarchical namespace.
    ensure "bucket gs://$BUCKET" gcloud storage buckets describe "gs://$BUCKET" :: \
        gcloud storage buckets create "gs://$BUCKET" --project="$PROJECT" --location="$REGION" --quiet \
        --uniform-bucket-level-access --enable-hierarchical-namespace
    ensure "service account $account" gcloud iam service-accounts describe "$account" --project="$PROJECT" :: \
        gcloud iam service-accounts create "tpu-$NAME" --project="$PROJECT" --quiet
    call gcloud storage buckets add-iam-policy-binding "gs://$BUCKET" --quiet \
        --member="serviceAccount:$account" --role=roles/storage.objectUser
    [ "$BACKEND" = gke ] || store_secrets
    "${BACKEND}_up"
    [ "$BACKEND" != gke ] || store_secrets # the cluster keeps them, so it must exist
    note "$NAME is up: $SLICES x $TYPE, each $hosts machines of $chips_per_host chips. It costs money until" \
        "./launch_tpu.sh down"
}

down() {
    local secret
    "${BACKEND}_down"
    for secret in $SECRETS; do
        [ "$BACKEND" != gke ] || continue
        remove "secret $(secret_name "$secret")" \
            gcloud secrets describe "$(secret_name "$secret")" --project="$PROJECT" :: \
            gcloud secrets delete "$(secret_name "$secret")" --project="$PROJECT" --quiet
    done
    remove "service account $account" gcloud iam service-accounts describe "$account" --project="$PROJECT" :: \
        gcloud iam service-accounts delete "$account" --project="$PROJECT" --quiet
    [ "${#stuck[@]}" = 0 ] || fail "could not remove: ${stuck[*]}; call down again"
    [ "$removed" -gt 0 ] || dry || note "there was nothing to remove"
    note "gs://$BUCKET stays, with the run; gcloud storage rm --recursive gs://$BUCKET removes it"
}

# Wait for the TPU, and request it again if it was preempted.
ready() {
    local state last='' until=$((SECONDS + MAX_WAIT_MINUTES * 60))
    if dry; then
        "${BACKEND}_until_ready"
        return
    fi
    while true; do
        state=$("${BACKEND}_state")
        [ "$state" = "$last" ] || note "$NAME: $state"
        last=$state
        case $state in
        ACTIVE) return ;;
        GONE*) request_again "$state" ;;
        esac
        [ "$SECONDS" -lt "$until" ] ||
            fail "no TPU after MAX_WAIT_MINUTES=$MAX_WAIT_MINUTES: $state. The request stays. Continue to wait with" \
                "./launch_tpu.sh up, or call down and try another ZONE, a smaller TYPE, SPOT=0 or a RESERVATION"
        sleep "$POLL_SECONDS"
    done
}

requeues=0
worker_words=()
request_again() { # STATE
    [ "$requeues" -lt "$MAX_REQUEUES" ] ||
        fail "$NAME was taken away: $1. It was already requested again $requeues times (MAX_REQUEUES). The same" \
            "command continues from the last checkpoint; TPUs with SPOT=0 or a RESERVATION are not preempted"
    requeues=$((requeues + 1))
    note "$NAME was taken away: $1. Requesting it again, $requeues of at most $MAX_REQUEUES"
    "${BACKEND}_delete"
    [ "${#stuck[@]}" = 0 ] || fail "could not remove its remains: ${stuck[*]}"
    "${BACKEND}_create"
}

# ---------------------------------------------------------------------------------------------------------------- run

send_code() {
    local changes
    changes=$(git status --porcelain)
    if [ -n "$changes" ] && [ "$ALLOW_DIRTY" != 1 ]; then
        refuse "uncommitted changes would not be sent:"$'\n'"$(head -10 <<<"$changes")"$'\n'"commit them, or set" \
            "ALLOW_DIRTY=1"
    fi
    code=$(git rev-parse --short=12 HEAD)
    PINNED_AT=${PINNED_AT:-$(git log -1 --format=%cI HEAD)}
    piped git archive --format=tar.gz HEAD :: gcloud storage cp - "$run_url/code/$code.tar.gz"
    call gcloud storage cp deploy/tpu/worker.sh "$run_url/worker.sh"
    worker_words=(BUCKET="$BUCKET" NAME="$NAME" CODE="$code" PINNED_AT="$PINNED_AT"
        PYTHON_VERSION="$PYTHON_VERSION" UV_VERSION="$UV_VERSION" RUNSC_RELEASE="$RUNSC_RELEASE" SECRETS="$SECRETS"
        -- python -m "retool_jax.$COMMAND" "${run_words[@]}")
}

# The shell command that starts the work on a virtual machine.
worker_line() {
    local script=/tmp/retool-worker.sh
    quoted gcloud storage cp "$run_url/worker.sh" "$script"
    printf ' && sudo bash %s ' "$script"
    quoted start "$@" "${worker_words[@]}"
}

statuses() { query gcloud storage cat "$run_url/status/**"; }



begin() {
    try gcloud storage rm --recursive "$run_url/status" # left from an earlier start
    "${BACKEND}_start"
}

run() {
    send_code
    [ "$BACKEND" = gke ] || ready
    begin
    note "the run continues without this program, which only watches; ./launch_tpu.sh watch watches again"
    watch
}

watch() {
    local state workers ended failed checks total=$((hosts * SLICES))
    if [ "$BACKEND" = gke ]; then
        gke_watch
        return
    elif dry; then
        # shellcheck disable=SC2016
        printf 'until %s; [ "$(%s | grep -c " exit ")" -ge %s ]; do sleep %s; done\n' \
            "$("${BACKEND}_state")" "$(statuses)" "$total" "$POLL_SECONDS"
        return
    fi
    while true; do
        state=$("${BACKEND}_state")
        workers=$(statuses)
        ended=$(grep -c ' exit ' <<<"$workers" || true)
        failed=$(grep -m 1 ' exit [^0]' <<<"$workers" || true)
        if [ -z "$failed" ] && [ "$ended" -ge "$total" ]; then
            note "all $total workers are done; the run is in gs://$BUCKET/runs"
            return
        fi
        # A preemption ends workers before the cloud reports it, so check the state again after a worker failed. Status
        # 2 means bad input, which is never a preemption.
        for ((checks = 0; checks < 5; checks++)); do
            if [ -z "$failed" ] || [ "${failed##* }" = 2 ] || [ "$SPOT" = 0 ] || [ "$state" != ACTIVE ]; then break; fi
            sleep "$POLL_SECONDS"
            state=$("${BACKEND}_state")
        done
        case $state in
        UNKNOWN*) note "$NAME: $state" ;;
        ACTIVE)
            [ -z "$failed" ] || {
                printf '%s\n' "$workers" | sed 's/^/    /' >&2
                gcloud storage cat --range=-3000 "$run_url/logs/${failed%% *}.log" >&2 || true
                fail "worker ${failed%% *} ended with status ${failed##* }. Its last log lines are above, and" \
                    "./launch_tpu.sh logs shows more; the same command continues from the last checkpoint"
            } ;;
        *)
            [ "${#worker_words[@]}" -gt 0 ] || # watch has no words to start workers with
                fail "$NAME was taken away: $state. ./launch_tpu.sh run with the same words requests another TPU and" \
                    "continues from the last checkpoint"
            request_again "$state"
            ready
            begin
            continue ;;
        esac
        sleep "$POLL_SECONDS"
    done
}

logs() {
    case "${run_words[*]}" in
    follow) "${BACKEND}_follow" ;;
    *) call gcloud storage cat --display-url --range=-20000 "$run_url/logs/**" ;;
    esac
}

status() {
    "${BACKEND}_status"
    look gcloud storage cat "$run_url/status/**"
}

main() {
    local word verb=${1-}
    case $verb in
    up | run | watch | logs | ssh | status | down) ;;
    '' | -h | --help | help) help && return ;;
    *) refuse "$verb is no verb; they are up, run, watch, logs, ssh, status and down. See ./launch_tpu.sh --help" ;;
    esac
    read_words "${@:2}"
    for word in "${run_words[@]}"; do
        case $verb:$word in
        run:*=* | logs:follow) ;;
        *) refuse "$verb does not read $word; key=value is for run only, and follow for logs only" ;;
        esac
    done
    check_settings
    [ "$verb" != run ] || [ "${#run_words[@]}" -gt 0 ] ||
        refuse "run needs arguments for retool_jax.$COMMAND, such as config=grpo_qwen2.5_32b"
    check_login
    if [ "$verb" = ssh ]; then "${BACKEND}_ssh"; else "$verb"; fi
}

main "$@"
