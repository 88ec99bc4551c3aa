#!/bin/sh
# Cloud TPU VMs through queued resources: ask for the slice, wait, install everywhere, train everywhere.
#
#     NAME=hope ZONE=us-west4-a TYPE=v5litepod-256 VERSION=v2-alpha-tpuv5-lite \
#     SOURCE=gs://BUCKET/hope_jax.tar.gz RUN=gs://BUCKET/runs/1b \
#         experiments/pod/queued_resources.sh 1.3b data=gs://BUCKET/text mesh.fsdp=128 mesh.tensor=2
#
# Needs gcloud. Types and versions: https://cloud.google.com/tpu/docs/runtimes. Delete the slice when it is done:
#     gcloud compute tpus queued-resources delete "$NAME" --zone "$ZONE" --force
set -eu
: "${NAME:?}" "${ZONE:?}" "${TYPE:?}" "${VERSION:?}" "${SOURCE:?}" "${RUN:?}"

gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" --zone "$ZONE" \
    --accelerator-type "$TYPE" --runtime-version "$VERSION" ${SPOT:+--spot}
until gcloud compute tpus queued-resources describe "$NAME" --zone "$ZONE" --format='value(state.state)' | grep -q ACTIVE; do
    sleep 30
done
everywhere() { gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"; }
everywhere "gcloud storage cp '$SOURCE' hope_jax.tar.gz && mkdir -p hope_jax && tar xzf hope_jax.tar.gz -C hope_jax &&
    cd hope_jax && python3.12 -m venv .venv && .venv/bin/pip install -q -c constraints.txt '.[tpu]'"
# jax finds the other hosts through the metadata of the slice.
everywhere "cd hope_jax && RUN='$RUN' HOPE=.venv/bin/hope nohup experiments/pod/host.sh $* > host.log 2>&1 < /dev/null &"
