#!/usr/bin/env bash
# One host of a run: mounts the bucket at /mnt/retool, installs, trains or evaluates, and writes the end to the bucket.
#   worker.sh start KEY=value ... -- COMMAND   on a virtual machine, as root: starts the work as a systemd unit, which
#                                              continues after the caller leaves; an older unit is stopped first
#   worker.sh work  KEY=value ... -- COMMAND   the work itself, in that unit or in a pod on GKE with the bucket mounted
set -euo pipefail

root=${RETOOL_ROOT-} # for tests, a folder to use instead of /
bucket_at=$root/mnt/retool
local_at=$root/opt/retool
log=$root/var/log/retool.log
words=("${@:2}")
BUCKET='' NAME='' CODE='' PINNED_AT='' PYTHON_VERSION='' UV_VERSION='' RUNSC_RELEASE='' SECRETS='' SLICE='' SLICES=1
verb=${1-}
case $verb in start | work) shift ;; *) echo "error: worker.sh start or worker.sh work" >&2 && exit 2 ;; esac
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case ${1%%=*} in
    BUCKET | NAME | CODE | PINNED_AT | PYTHON_VERSION | UV_VERSION | RUNSC_RELEASE | SECRETS | SLICE | SLICES)
        declare "${1%%=*}=${1#*=}" ;;
    *) echo "error: ${1%%=*} is no setting of worker.sh" >&2 && exit 2 ;;
    esac
    shift
done
command=("${@:2}")
here=$bucket_at/$NAME # this run's folder in the bucket
host=$(hostname)
export PATH=$PATH:/snap/bin # where Google's images have gcloud

start() {
    systemctl stop retool 2>/dev/null || true
    systemctl reset-failed retool 2>/dev/null || true
    rm -f "$here/status/$host" # the status of the unit that was just stopped
    install -D -m 700 "$0" "$root/usr/local/sbin/retool-worker"
    systemd-run --unit=retool --property=LimitNOFILE=1000000 --property=LimitMEMLOCK=infinity --setenv=HOME=/root \
        "$root/usr/local/sbin/retool-worker" work "${words[@]}"
}

on_machine() { [ -d "$root/run/systemd/system" ]; }

# One line for launch_tpu.sh: HOST STATE. If the bucket could not be mounted, gcloud writes it there.
tell() {
    if mountpoint -q "$bucket_at"; then
        mkdir -p "$here/status"
        echo "$host $*" >"$here/status/$host"
    else
        echo "$host $*" | gcloud storage cp - "gs://$BUCKET/$NAME/status/$host" || true
    fi
}

finish() {
    local code=$1
    [ -z "${copying-}" ] || kill "$copying" 2>/dev/null || true
    if mountpoint -q "$bucket_at"; then mkdir -p "$here/logs" && cp "$log" "$here/logs/$host.log"; fi || true
    tell "exit $code"
}

repository() { # NAME KEY "ADDRESS SUITE COMPONENT": add a repository to apt
    curl -fsSL "$2" | gpg --dearmor --yes -o "/usr/share/keyrings/$1.gpg"
    echo "deb [signed-by=/usr/share/keyrings/$1.gpg] $3" >"/etc/apt/sources.list.d/$1.list"
}

packages() { apt-get -o DPkg::Lock::Timeout=600 install -y -qq --no-install-recommends "$@" >/dev/null; }

refresh() { apt-get -o DPkg::Lock::Timeout=600 update -qq; }

mount_bucket() {
    mountpoint -q "$bucket_at" && return
    command -v gcsfuse >/dev/null || {
        repository gcsfuse https://packages.cloud.google.com/apt/doc/apt-key.gpg \
            "https://packages.cloud.google.com/apt gcsfuse-$(sed -n s/^VERSION_CODENAME=//p /etc/os-release) main"
        refresh
        packages gcsfuse
    }
    mkdir -p "$bucket_at"
    # A separate unit, so that it outlives the training. Files of other hosts are visible at once, and a file is in the
    # bucket when fsync returns, which would not be so with streaming writes.
    systemd-run --unit=retool-bucket --collect gcsfuse --foreground --implicit-dirs --metadata-cache-ttl-secs=0 \
        --enable-streaming-writes=false "$BUCKET" "$bucket_at"
    for _ in {1..60}; do
        sleep 1
        ! mountpoint -q "$bucket_at" || return 0
    done
    echo "error: gs://$BUCKET could not be mounted; see journalctl -u retool-bucket" >&2
    return 1
}

# The code of one commit, in its own environment. Packages are not newer than PINNED_AT, so every host and every restart
# has the same versions.
install_code() {
    local to=$local_at/$CODE
    [ ! -e "$to/ready" ] || return 0
    rm -rf "$to"
    mkdir -p "$to/code"
    tar -xzf "$here/code/$CODE.tar.gz" -C "$to/code"
    if on_machine; then packages python3-venv; fi # the Python of a pod has it
    [ -x "$local_at/uv/bin/uv-$UV_VERSION" ] || {
        python3 -m venv --clear "$local_at/uv"
        "$local_at/uv/bin/pip" install -q "uv==$UV_VERSION"
        ln -s uv "$local_at/uv/bin/uv-$UV_VERSION"
    }
    "$local_at/uv/bin/uv" venv -q --seed --python "$PYTHON_VERSION" "$to/env"
    "$local_at/uv/bin/uv" pip install -q --python "$to/env/bin/python" --exclude-newer "$PINNED_AT" "$to/code[tpu]"
    touch "$to/ready"
}

install_runsc() {
    command -v runsc >/dev/null && return
    repository gvisor https://gvisor.dev/archive.key \
        "https://storage.googleapis.com/gvisor/releases $RUNSC_RELEASE main"
    refresh
    packages runsc
}

prepare() {
    set -e
    echo "$host: $(date -u +%FT%TZ), code $CODE"
    refresh
    packages ca-certificates curl gnupg
    if on_machine; then mount_bucket; fi
    install_runsc
    install_code
}

# Secrets become variables of the training process and are stored nowhere else.
read_secrets() {
    local key value object
    for key in $SECRETS; do
        on_machine || continue # a pod has its secrets already
        object=$NAME-$(tr '[:upper:]_' '[:lower:]-' <<<"$key")
        value=$(gcloud secrets versions access latest --secret="$object" 2>/dev/null) || continue # none was stored
        export "$key=$value"
    done
}

attribute() { # NAME: a value from this machine's metadata
    curl -fsS -H 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

# Queued resources and GKE tell the hosts about the slices. With instance groups, the first machine of the first slice
# writes its address, and all others wait for it.
join_slices() {
    local address=$here/status/coordinator
    [ "$SLICES" -gt 1 ] || return 0
    if [ "$SLICE" = 0 ] && [ "$(attribute agent-worker-number)" = 0 ]; then
        echo "coordinator $(hostname -I | cut -d' ' -f1)" >"$address"
    fi
    until [ -s "$address" ]; do sleep 2; done
    MEGASCALE_COORDINATOR_ADDRESS=$(cut -d' ' -f2 "$address")
    export MEGASCALE_COORDINATOR_ADDRESS MEGASCALE_NUM_SLICES=$SLICES MEGASCALE_SLICE_ID=$SLICE MEGASCALE_PORT=8080
}

work() {
    trap 'finish $?' EXIT
    touch "$log"
    prepare 2>&1 | tee -a "$log"
    tell running
    mkdir -p "$here/logs" "$bucket_at/compiled"
    while sleep 30; do cp "$log" "$here/logs/$host.log"; done >/dev/null 2>&1 &
    copying=$!
    read_secrets
    join_slices
    export PATH=$local_at/$CODE/env/bin:$PATH UV_PYTHON_INSTALL_DIR=$local_at/python
    export JAX_COMPILATION_CACHE_DIR=$bucket_at/compiled TF_CPP_MIN_LOG_LEVEL=1
    cd "$local_at/$CODE/code"
    mkdir -p "$bucket_at/runs"
    ln -sfn "$bucket_at/runs" runs # the default folder of runs
    "${command[@]}" 2>&1 | tee -a "$log"
}

export UV_PYTHON_INSTALL_DIR=$local_at/python # not below /root, so that programs in the sandbox can read it
"$verb"
