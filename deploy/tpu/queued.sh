# BACKEND=queued: queued resources of the Cloud TPU API. One request holds all slices.
# https://cloud.google.com/tpu/docs/queued-resources
# shellcheck shell=bash

queued_check() {
    [ "$generation" != tpu7x ] ||
        refuse "queued resources do not serve tpu7x and later; choose BACKEND=mig or BACKEND=gke"
}

queued() { # VERB WORDS: a command on this run's request
    local verb=$1
    shift
    "${how[@]}" gcloud compute tpus queued-resources "$verb" "$NAME" --project="$PROJECT" --zone="$ZONE" --quiet "$@"
}

queued_create() {
    local tool=(gcloud compute) words=()
    if [ -n "$RESERVATION" ]; then
        tool=(gcloud alpha compute) # only the alpha command takes the name of a reservation
        words+=(--reserved --reservation="projects/$PROJECT/locations/$ZONE/reservations/$RESERVATION")
    elif [ "$SPOT" = 1 ]; then
        words+=(--spot)
    fi
    if [ "$SLICES" = 1 ]; then words+=(--node-id="$NAME"); else
        words+=(--node-count="$SLICES" --node-prefix="$NAME")
    fi
    ensure "queued resource $NAME" \
        gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" --quiet :: \
        "${tool[@]}" tpus queued-resources create "$NAME" --project="$PROJECT" --zone="$ZONE" --quiet \
        --accelerator-type="$accelerator" --runtime-version="$runtime" "${words[@]}" \
        --network="$NETWORK" --service-account="$account" --scopes=https://www.googleapis.com/auth/cloud-platform
}

queued_up() {
    queued_create
    ready
}

queued_state() {
    local how=(ask) answer
    if dry; then
        how=(quoted)
        queued describe '--format=value(state.state)'
        return
    fi
    queued describe '--format=value(state.state)' || true
    case $answer in
    ACTIVE | GONE* | UNKNOWN*) echo "$answer" ;;
    ACCEPTED | CREATING | PROVISIONING | WAITING_FOR_RESOURCES) echo "WAITING ($answer)" ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING) echo "GONE ($answer)" ;;
    *) echo "UNKNOWN ($answer)" ;;
    esac
}

queued_until_ready() { printf 'until [ "$(%s)" = ACTIVE ]; do sleep %s; done\n' "$(queued_state)" "$POLL_SECONDS"; }

queued_delete() {
    remove "queued resource $NAME" \
        gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" --quiet :: \
        gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --quiet --force
}

queued_down() { queued_delete; }

queued_start() {
    local how=(through)
    queued ssh --node=all --worker=all "${tunnel[@]}" --command="$(worker_line)"
}

queued_ssh() { # COMMAND, or nothing for an interactive shell
    local how=(take_over)
    queued ssh --node="${WORKER%%/*}" --worker="${WORKER##*/}" "${tunnel[@]}" ${1:+"--command=$1"}
}

queued_follow() { queued_ssh 'sudo tail -n 200 -F /var/log/retool.log'; }

queued_status() {
    local how=(look)
    queued describe
}
