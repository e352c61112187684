# BACKEND=mig: a managed instance group on Compute Engine for each slice; it gets all its machines at once or none.
# https://docs.cloud.google.com/compute/docs/tpus/create-tpu-mig-multi-host-slice
# shellcheck shell=bash

mig_check() {
    [ "$generation" != v5e ] ||
        refuse "managed instance groups serve v5p, v6e and tpu7x, not v5e; choose BACKEND=queued or BACKEND=gke"
    workload=$NAME-$topology
    template=$NAME-$machine-standard
    [ "$SPOT" = 0 ] || template=$NAME-$machine-spot
    [ -z "$RESERVATION" ] || template=$NAME-$machine-reserved
}

groups() { # VERB SLICE WORDS
    local verb=$1 group=$NAME-$2
    shift 2
    "${how[@]}" gcloud compute instance-groups managed "$verb" "$group" --project="$PROJECT" --zone="$ZONE" --quiet "$@"
}

mig_create() {
    local slice words=(--template="projects/$PROJECT/regions/$REGION/instanceTemplates/$template" --size="$hosts")
    # The workload policy sets how the machines of a slice are connected; a single machine needs none.
    [ "$hosts" = 1 ] || words+=(--target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing
        --workload-policy="projects/$PROJECT/regions/$REGION/resourcePolicies/$workload")
    for ((slice = 0; slice < SLICES; slice++)); do
        ensure "instance group $NAME-$slice" \
            gcloud compute instance-groups managed describe "$NAME-$slice" --project="$PROJECT" --zone="$ZONE" :: \
            gcloud compute instance-groups managed create "$NAME-$slice" --project="$PROJECT" --zone="$ZONE" --quiet \
            "${words[@]}"
    done
}

mig_up() {
    local words=(--maintenance-policy=TERMINATE)
    [ "$generation" != tpu7x ] || words+=(--boot-disk-type=hyperdisk-balanced)
    if [ -n "$RESERVATION" ]; then
        words+=(--provisioning-model=RESERVATION_BOUND --reservation-affinity=specific --reservation="$RESERVATION")
    elif [ "$SPOT" = 1 ]; then
        words+=(--provisioning-model=SPOT --instance-termination-action=DELETE)
    fi
    [ "$hosts" = 1 ] || ensure "workload policy $workload" \
        gcloud compute resource-policies describe "$workload" --project="$PROJECT" --region="$REGION" :: \
        gcloud compute resource-policies create workload-policy "$workload" --project="$PROJECT" --region="$REGION" \
        --quiet --type=HIGH_THROUGHPUT --accelerator-topology="$topology" --accelerator-topology-mode=AUTO_CONNECT
    ensure "instance template $template" \
        gcloud compute instance-templates describe "$template" --project="$PROJECT" --region="$REGION" :: \
        gcloud compute instance-templates create "$template" --project="$PROJECT" --instance-template-region="$REGION" \
        --quiet --machine-type="$machine" --image-project=ubuntu-os-accelerator-images --image-family="$image_family" \
        --boot-disk-size=200GB --network="$NETWORK" --service-account="$account" --scopes=cloud-platform "${words[@]}"
    mig_create
    ready
}

mig_state() {
    local how=(ask) slice answer running
    for ((slice = 0; slice < SLICES; slice++)); do
        if dry; then
            how=(quoted)
            [ "$slice" = 0 ] || printf '; '
            groups list-instances "$slice" '--format=value(instanceStatus)'
            continue
        fi
        groups list-instances "$slice" '--format=value(instanceStatus)' || {
            echo "$answer"
            return
        }
        running=$(grep -c RUNNING <<<"$answer" || true)
        [ "$running" -ge "$hosts" ] || {
            # A group that waits for machines and one that has lost some look the same: the caller knows which it is.
            echo "WAITING ($running of $hosts machines of slice $slice run)"
            return
        }
    done
    dry || echo ACTIVE
}

mig_until_ready() {
    local how=(query) slice
    for ((slice = 0; slice < SLICES; slice++)); do
        printf 'until [ "$(%s | grep -c RUNNING)" -ge %s ]; do sleep %s; done\n' \
            "$(groups list-instances "$slice" '--format=value(instanceStatus)')" "$hosts" "$POLL_SECONDS"
    done
}

mig_delete() {
    local slice
    for ((slice = 0; slice < SLICES; slice++)); do
        remove "instance group $NAME-$slice" \
            gcloud compute instance-groups managed describe "$NAME-$slice" --project="$PROJECT" --zone="$ZONE" :: \
            gcloud compute instance-groups managed delete "$NAME-$slice" --project="$PROJECT" --zone="$ZONE" --quiet
    done
}

mig_down() {
    mig_delete
    remove "instance template $template" \
        gcloud compute instance-templates describe "$template" --project="$PROJECT" --region="$REGION" :: \
        gcloud compute instance-templates delete "$template" --project="$PROJECT" --region="$REGION" --quiet
    remove "workload policy $workload" \
        gcloud compute resource-policies describe "$workload" --project="$PROJECT" --region="$REGION" :: \
        gcloud compute resource-policies delete "$workload" --project="$PROJECT" --region="$REGION" --quiet
}

machines() { # SLICE: the names of its machines, or in a dry run the command that lists them
    local how=(query)
    groups list-instances "$1" '--format=value(instance.basename())'
}

mig_start() {
    local slice machine names line
    for ((slice = 0; slice < SLICES; slice++)); do
        line=$(worker_line SLICE="$slice" SLICES="$SLICES")
        if dry; then
            printf 'for machine in $(%s); do gcloud compute ssh "$machine" %s; done\n' "$(machines "$slice")" \
                "$(quoted --project="$PROJECT" --zone="$ZONE" --quiet "${tunnel[@]}" --command="$line")"
            continue
        fi
        mapfile -t names < <(machines "$slice")
        [ "${#names[@]}" -ge "$hosts" ] ||
            fail "slice $slice has ${#names[@]} of $hosts machines; run the same again once status shows all"
        for machine in "${names[@]}"; do
            through gcloud compute ssh "$machine" --project="$PROJECT" --zone="$ZONE" --quiet "${tunnel[@]}" \
                --command="$line"
        done
    done
}

mig_ssh() { # COMMAND, or nothing for an interactive shell
    local machine names slice=${WORKER%%/*} number=${WORKER##*/}
    local words=(--project="$PROJECT" --zone="$ZONE" --quiet "${tunnel[@]}" ${1:+"--command=$1"})
    if dry; then
        printf 'gcloud compute ssh "$(%s | sort | sed -n %sp)" %s\n' \
            "$(machines "$slice")" $((number + 1)) "$(quoted "${words[@]}")"
        return
    fi
    names=$(machines "$slice" | sort)
    machine=$(sed -n "$((number + 1))p" <<<"$names")
    [ -n "$machine" ] || fail "slice $slice has no machine $number; it has: ${names//$'\n'/ }"
    take_over gcloud compute ssh "$machine" "${words[@]}"
}

mig_follow() { mig_ssh 'sudo tail -n 200 -F /var/log/retool.log'; }

mig_status() {
    local how=(look) slice
    for ((slice = 0; slice < SLICES; slice++)); do
        groups list-instances "$slice"
        groups list-errors "$slice" --limit=5
    done
}
