#!/usr/bin/env bash
# From an empty Google Cloud project to a training run on TPU. ./launch_tpu.sh --help says how, docs/tpu.md tells more.
set -euo pipefail
shopt -s lastpipe # what a pipe ends in may set variables
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
./launch_tpu.sh VERB [SETTING=value ...] [WORD=value ...]

    up       make what the run needs: bucket, service account, secrets and the TPU; wait for the TPU
    run      send the code of HEAD, train or evaluate on all workers, watch; begin again after a preemption
    watch    watch a run that goes on without its launcher, as "run" does
    logs     what each worker said last, from the bucket; "logs follow" shows one as it goes on
    ssh      a shell on one worker
    status   what the cloud says of the TPU, and each worker of its run
    down     remove everything that "up" made but the bucket, which holds the run

Words in small letters are those of python -m retool_jax.COMMAND. Its runs/ are gs://BUCKET/runs, and the bucket is the
folder /mnt/retool of every worker:
    ./launch_tpu.sh up  PROJECT=my-project ZONE=us-east5-a TYPE=v5p-64
    ./launch_tpu.sh run PROJECT=my-project ZONE=us-east5-a TYPE=v5p-64 config=grpo_qwen2.5_32b rl.steps=150

Settings, as words or as variables of the environment:
    PROJECT            the Google Cloud project
    ZONE               the zone, such as us-east5-a
    TYPE=v5p-64        the slice: v5p-N and tpu7x-N count cores (two a chip), v6e-N and v5e-N count chips
    SLICES=1           so many slices
    COMMAND=train      train or evaluate: what "run" starts
    NAME=retool        the run, and what is made for it; small letters, digits and -, at most 20
    BACKEND=queued     queued: queued resources (v5p, v6e, v5e); mig: managed instance groups (v5p, v6e, tpu7x);
                       gke: a Kubernetes cluster (all)
    BUCKET             PROJECT-retool unless given: code, run, checkpoints, logs, compiled programs
    SPOT=1             0: on demand, at the full price, and not taken away
    RESERVATION        the name of a reservation; in the place of SPOT
    MAX_REQUEUES=10    how often a TPU that was taken away is asked for again; on GKE, how often a failed job restarts
    MAX_WAIT_MINUTES=1440   how long to wait for a TPU
    POLL_SECONDS=60    how long between two looks
    RUNTIME            the image of queued resources; unless given, that of the type
    NETWORK=default    the network of the machines
    CLUSTER            gke: an existing cluster to use; unless given, one is made and removed
    IMAGE=python:3.12-bookworm   gke: what the pods start from
    PYTHON_VERSION=3.12   the Python of the workers
    PINNED_AT          packages are those of this moment; unless given, that of the commit
    UV_VERSION=0.13.9   the release of uv, which installs them
    RUNSC_RELEASE=20261005   the release of gVisor
    SECRETS="HF_TOKEN WANDB_API_KEY"   variables that the training gets; "up" stores those that are set here
    WORKER=0           of logs follow and ssh: the worker, or SLICE/WORKER
    IAP=0              1: ssh through the Identity-Aware Proxy, for machines without an open port
    ALLOW_DIRTY=0      1: send HEAD although there are changes that are not committed
    DRY_RUN=0          1: print the commands, to read or to paste, and run none
END
}

# What every setting is unless it is given. An empty one has no value that fits all.
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
    asked=()
    for word; do
        case $word in
        --) ;;
        [A-Z]*=*)
            [[ $names == *" ${word%%=*} "* ]] || refuse "${word%%=*} is no setting; the settings are:$names"
            declare -g "$word" ;;
        *=* | follow) asked+=("$word") ;;
        *) refuse "$word is neither SETTING=value nor a word of the run, key=value; see ./launch_tpu.sh --help" ;;
        esac
    done
}

check_settings() {
    local name
    for name in PROJECT ZONE; do
        [ -n "${!name}" ] || refuse "$name is not set; say $name=..., as a word or in the environment"
    done
    for name in SLICES MAX_REQUEUES MAX_WAIT_MINUTES POLL_SECONDS; do
        [[ ${!name} =~ ^[0-9]+$ ]] || refuse "$name=${!name} is no number"
    done
    [ "$SLICES" -gt 0 ] || refuse "SLICES=$SLICES: a run has at least one slice"
    [[ $NAME =~ ^[a-z][a-z0-9-]{0,18}[a-z0-9]$ ]] ||
        refuse "NAME=$NAME: 2 to 20 small letters, digits and -, a letter first"
    [[ $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z0-9]+$ ]] ||
        refuse "ZONE=$ZONE is no zone; one is called us-east5-a, a region us-east5"
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
    at=gs://$BUCKET/$NAME
    account=tpu-$NAME@$PROJECT.iam.gserviceaccount.com
    tunnel=()
    [ "$IAP" = 0 ] || tunnel=(--tunnel-through-iap)
    read_type
    "${BACKEND}_check"
}

check_login() {
    dry || command -v gcloud >/dev/null ||
        refuse "gcloud is not installed; https://cloud.google.com/sdk/docs/install says how"
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
            note "$variable is not set here, so the training has what was stored before, or none"
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
    # Folders that are renamed in one step, as checkpoints are, need a hierarchical namespace.
    ensure "bucket gs://$BUCKET" gcloud storage buckets describe "gs://$BUCKET" :: \
        gcloud storage buckets create "gs://$BUCKET" --project="$PROJECT" --location="$REGION" --quiet \
        --uniform-bucket-level-access --enable-hierarchical-namespace
    ensure "service account $account" gcloud iam service-accounts describe "$account" --project="$PROJECT" :: \
        gcloud iam service-accounts create "tpu-$NAME" --project="$PROJECT" --quiet
    call gcloud storage buckets add-iam-policy-binding "gs://$BUCKET" --quiet \
        --member="serviceAccount:$account" --role=roles/storage.objectUser
    [ "$BACKEND" = gke ] || store_secrets
    "${BACKEND}_up"
    [ "$BACKEND" != gke ] || store_secrets # they are kept in the cluster
    note "$NAME is up: $SLICES x $TYPE, $hosts machines of $chips_per_host chips each. It costs money until" \
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

# Wait until the TPU is there. One that was taken away is asked for again.
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
        GONE*) again "$state" ;;
        esac
        [ "$SECONDS" -lt "$until" ] ||
            fail "no TPU after MAX_WAIT_MINUTES=$MAX_WAIT_MINUTES: $state. The request stays, and ./launch_tpu.sh up" \
                "waits on; or down, and another ZONE, a smaller TYPE, SPOT=0 or a RESERVATION"
        sleep "$POLL_SECONDS"
    done
}

requeues=0
worker_words=()
again() {
    [ "$requeues" -lt "$MAX_REQUEUES" ] ||
        fail "$NAME was taken away: $1, and asked for again $requeues times (MAX_REQUEUES). The same run goes on from" \
            "what it saved; SPOT=0 or a RESERVATION is not taken away"
    requeues=$((requeues + 1))
    note "$NAME was taken away: $1. Asking again, $requeues of at most $MAX_REQUEUES"
    "${BACKEND}_delete"
    [ "${#stuck[@]}" = 0 ] || fail "could not remove what is left of it: ${stuck[*]}"
    "${BACKEND}_create"
}

# ---------------------------------------------------------------------------------------------------------------- run

send_code() {
    local changes
    changes=$(git status --porcelain)
    if [ -n "$changes" ] && [ "$ALLOW_DIRTY" != 1 ]; then
        refuse "what is not committed would not be sent:"$'\n'"$(head -10 <<<"$changes")"$'\n'"commit it, or say" \
            "ALLOW_DIRTY=1"
    fi
    code=$(git rev-parse --short=12 HEAD)
    PINNED_AT=${PINNED_AT:-$(git log -1 --format=%cI HEAD)}
    piped git archive --format=tar.gz HEAD :: gcloud storage cp - "$at/code/$code.tar.gz"
    call gcloud storage cp deploy/tpu/worker.sh "$at/worker.sh"
    worker_words=(BUCKET="$BUCKET" NAME="$NAME" CODE="$code" PINNED_AT="$PINNED_AT"
        PYTHON_VERSION="$PYTHON_VERSION" UV_VERSION="$UV_VERSION" RUNSC_RELEASE="$RUNSC_RELEASE" SECRETS="$SECRETS"
        -- python -m "retool_jax.$COMMAND" "${asked[@]}")
}

# The line that begins the work on a virtual machine.
worker_line() {
    printf '%s && sudo bash /tmp/retool-worker.sh %s' \
        "$(quoted gcloud storage cp "$at/worker.sh" /tmp/retool-worker.sh)" "$(quoted start "$@" "${worker_words[@]}")"
}

statuses() { query gcloud storage cat "$at/status/**"; }

tell_ends() { statuses | sed 's/^/    /' >&2; }

begin() {
    try gcloud storage rm --recursive "$at/status" # how workers ended before
    "${BACKEND}_start"
}

run() {
    send_code
    [ "$BACKEND" = gke ] || ready
    begin
    note "the run goes on without this program, which watches it: ./launch_tpu.sh watch watches again"
    watch
}

watch() {
    local state said ended failed look total=$((hosts * SLICES))
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
        said=$(statuses)
        ended=$(grep -c ' exit ' <<<"$said" || true)
        failed=$(grep -m 1 ' exit [^0]' <<<"$said" || true)
        if [ -z "$failed" ] && [ "$ended" -ge "$total" ]; then
            note "all $total workers are done; gs://$BUCKET/runs holds the run"
            return
        fi
        # A spot TPU that is taken away ends its workers before the cloud says so. Bad input, 2, is no sign of that.
        for ((look = 0; look < 5; look++)); do
            if [ -z "$failed" ] || [ "${failed##* }" = 2 ] || [ "$SPOT" = 0 ] || [ "$state" != ACTIVE ]; then break; fi
            sleep "$POLL_SECONDS"
            state=$("${BACKEND}_state")
        done
        case $state in
        UNKNOWN*) note "$NAME: $state" ;;
        ACTIVE)
            [ -z "$failed" ] || {
                printf '%s\n' "$said" | sed 's/^/    /' >&2
                gcloud storage cat --range=-3000 "$at/logs/${failed%% *}.log" >&2 || true
                fail "worker ${failed%% *} ended with status ${failed##* }. Above is what it said last, and" \
                    "./launch_tpu.sh logs shows all; the same command goes on from what it saved"
            } ;;
        *)
            [ "${#worker_words[@]}" -gt 0 ] ||
                fail "$NAME was taken away: $state. The same run asks for another, and goes on from what it saved"
            again "$state"
            ready
            begin
            continue ;;
        esac
        sleep "$POLL_SECONDS"
    done
}

logs() {
    case "${asked[*]}" in
    follow) "${BACKEND}_follow" ;;
    *) call gcloud storage cat --display-url --range=-20000 "$at/logs/**" ;;
    esac
}

status() {
    "${BACKEND}_status"
    look gcloud storage cat "$at/status/**"
}

main() {
    local word verb=${1-}
    case $verb in
    up | run | watch | logs | ssh | status | down) ;;
    '' | -h | --help | help) help && return ;;
    *) refuse "$verb is no verb; they are up, run, watch, logs, ssh, status and down. See ./launch_tpu.sh --help" ;;
    esac
    read_words "${@:2}"
    for word in "${asked[@]}"; do
        case $verb:$word in
        run:*=* | logs:follow) ;;
        *) refuse "$verb does not read $word; the words of a run go with run, and follow with logs" ;;
        esac
    done
    check_settings
    [ "$verb" != run ] || [ "${#asked[@]}" -gt 0 ] ||
        refuse "run needs the words of a training or an evaluation, such as config=grpo_qwen2.5_32b"
    check_login
    if [ "$verb" = ssh ]; then "${BACKEND}_ssh"; else "$verb"; fi
}

main "$@"
