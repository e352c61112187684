# BACKEND=gke: a cluster with a node pool for each slice; the run is a JobSet, which restarts after preemptions.
# https://cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice
# shellcheck shell=bash

JOBSET=https://github.com/kubernetes-sigs/jobset/releases/download/v0.11.1/manifests.yaml

gke_check() {
    command -v kubectl >/dev/null || dry ||
        refuse "kubectl is not installed: gcloud components install kubectl gke-gcloud-auth-plugin"
    own_cluster=0
    [ -n "$CLUSTER" ] || own_cluster=1 CLUSTER=$NAME
    kube=(kubectl --context="gke_${PROJECT}_${ZONE}_$CLUSTER")
    cluster=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")
    workload=$NAME-$topology
}

gke_pools() {
    local slice words=()
    [ "$hosts" = 1 ] || words+=(--tpu-topology="$topology")
    [ "$generation" != tpu7x ] || words+=(--disk-type=hyperdisk-balanced)
    if [ -n "$RESERVATION" ]; then
        words+=(--reservation-affinity=specific --reservation="$RESERVATION")
    elif [ "$SPOT" = 1 ]; then
        words+=(--spot)
    fi
    if [ "$generation" = tpu7x ] && [ "$hosts" -gt 1 ]; then
        ensure "workload policy $workload" \
            gcloud compute resource-policies describe "$workload" --project="$PROJECT" --region="$REGION" :: \
            gcloud compute resource-policies create workload-policy "$workload" --project="$PROJECT" \
            --region="$REGION" --quiet --type=HIGH_THROUGHPUT --accelerator-topology="$topology"
        words+=(--placement-policy="$workload")
    fi
    for ((slice = 0; slice < SLICES; slice++)); do
        ensure "node pool $NAME-$slice" \
            gcloud container node-pools describe "$NAME-$slice" "${cluster[@]}" :: \
            gcloud container node-pools create "$NAME-$slice" "${cluster[@]}" \
            --quiet --node-locations="$ZONE" --machine-type="$machine" --num-nodes="$hosts" --disk-size=200 \
            --workload-metadata=GKE_METADATA "${words[@]}"
    done
}

gke_up() {
    [ "$own_cluster" = 0 ] || ensure "cluster $CLUSTER" \
        gcloud container clusters describe "$CLUSTER" --project="$PROJECT" --zone="$ZONE" :: \
        gcloud container clusters create "$CLUSTER" --project="$PROJECT" --zone="$ZONE" --quiet \
        --release-channel=rapid --num-nodes=1 --machine-type=e2-standard-4 --network="$NETWORK" \
        --workload-pool="$PROJECT.svc.id.goog" --addons=GcsFuseCsiDriver
    gke_pools
    call gcloud container clusters get-credentials "$CLUSTER" --project="$PROJECT" --zone="$ZONE" --quiet
    call "${kube[@]}" apply --server-side -f "$JOBSET"
    call "${kube[@]}" -n jobset-system wait --for=condition=Available deploy/jobset-controller-manager --timeout=300s
    # Pods with this account access the bucket as the run's service account.
    ensure "Kubernetes service account $NAME" "${kube[@]}" get serviceaccount "$NAME" :: \
        "${kube[@]}" create serviceaccount "$NAME"
    call "${kube[@]}" annotate --overwrite serviceaccount "$NAME" "iam.gke.io/gcp-service-account=$account"
    call gcloud iam service-accounts add-iam-policy-binding "$account" --project="$PROJECT" --quiet \
        --role=roles/iam.workloadIdentityUser "--member=serviceAccount:$PROJECT.svc.id.goog[default/$NAME]"
}

gke_store() { # NAME OBJECT: a secret
    try "${kube[@]}" delete secret "$2"
    secretly "$1" "${kube[@]}" create secret generic "$2" --from-file="$1=/dev/stdin"
}

gke_start() {
    local words=(--name="$NAME" --gke-type="$gke_type" --topology="$topology" --hosts="$hosts" --slices="$SLICES"
        --chips-per-host="$chips_per_host" --restarts="$MAX_REQUEUES" --bucket="$BUCKET" --image="$IMAGE")
    [ "$SPOT" = 0 ] || [ -n "$RESERVATION" ] || words+=(--spot)
    for secret in $SECRETS; do words+=(--secret="$secret=$(secret_name "$secret")"); done
    call "${kube[@]}" delete jobset "$NAME" --ignore-not-found --wait
    piped python3 deploy/tpu/jobset.py "${words[@]}" -- "${worker_words[@]}" :: "${kube[@]}" apply -f -
}

gke_state() {
    local words=("${kube[@]}" get jobset "$NAME" -o 'jsonpath={.status.terminalState}') answer
    if dry; then
        quoted "${words[@]}"
        return
    fi
    ask "${words[@]}" || true
    echo "${answer:-ACTIVE}"
}

# The JobSet restarts a failed run until it gives up.
gke_watch() {
    local state
    if dry; then
        printf 'until [ -n "$(%s)" ]; do sleep %s; done\n' "$(gke_state)" "$POLL_SECONDS"
        return
    fi
    while true; do
        state=$(gke_state)
        case $state in
        Completed) note "$NAME is done" && return ;;
        ACTIVE | UNKNOWN*) sleep "$POLL_SECONDS" ;;
        *)
            statuses | sed 's/^/    /' >&2
            fail "the JobSet $NAME ended as $state, after at most $MAX_REQUEUES restarts. See ./launch_tpu.sh logs;" \
                "the same command continues from the last checkpoint" ;;
        esac
    done
}

gke_down() {
    local slice secret
    if [ "$own_cluster" = 1 ]; then
        remove "cluster $CLUSTER" \
            gcloud container clusters describe "$CLUSTER" --project="$PROJECT" --zone="$ZONE" :: \
            gcloud container clusters delete "$CLUSTER" --project="$PROJECT" --zone="$ZONE" --quiet
    else # in another owner's cluster, remove only what belongs to this run
        try "${kube[@]}" delete jobset "$NAME" --ignore-not-found
        try "${kube[@]}" delete serviceaccount "$NAME" --ignore-not-found
        for secret in $SECRETS; do try "${kube[@]}" delete secret "$(secret_name "$secret")" --ignore-not-found; done
        for ((slice = 0; slice < SLICES; slice++)); do
            remove "node pool $NAME-$slice" \
                gcloud container node-pools describe "$NAME-$slice" "${cluster[@]}" :: \
                gcloud container node-pools delete "$NAME-$slice" "${cluster[@]}" --quiet
        done
    fi
    remove "workload policy $workload" \
        gcloud compute resource-policies describe "$workload" --project="$PROJECT" --region="$REGION" :: \
        gcloud compute resource-policies delete "$workload" --project="$PROJECT" --region="$REGION" --quiet
}

gke_pod() { # the pod of WORKER, or in a dry run the command that finds it
    local slice=${WORKER%%/*} labels=jobset.sigs.k8s.io/jobset-name=$NAME
    labels+=,jobset.sigs.k8s.io/job-index=$slice,batch.kubernetes.io/job-completion-index=${WORKER##*/}
    query "${kube[@]}" get pods -l "$labels" -o name
}

in_pod() { # WORDS for kubectl, with POD in the place of the pod's name
    local pod line
    pod=$(gke_pod)
    if dry; then
        line=$(quoted "${kube[@]}" "$@")
        printf '%s\n' "${line//POD/\"\$($pod)\"}"
        return
    fi
    [ -n "$pod" ] || fail "worker $WORKER has no pod; see ./launch_tpu.sh status"
    take_over "${kube[@]}" "${@/POD/$pod}"
}

gke_ssh() { in_pod exec -it POD -c train -- bash; }

gke_follow() { in_pod logs -f POD -c train; }

gke_status() {
    look "${kube[@]}" get jobset "$NAME"
    look "${kube[@]}" get pods -l "jobset.sigs.k8s.io/jobset-name=$NAME" -o wide
}
