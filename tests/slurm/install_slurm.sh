#!/usr/bin/env bash
# Installs Slurm for the tests in this folder: on Debian and its kin, for root, if it is not there. Exits non-zero where
# that is not possible; those tests are skipped then.

set -euo pipefail
packages=(slurmctld slurmd slurm-client munge libpmix-dev)

for command in slurmctld slurmd sbatch munged; do
    command -v "$command" >/dev/null || missing=true
done
[[ -n ${missing:-} ]] || exit 0
if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "Slurm is not installed, and this is not root on Debian" >&2
    exit 1
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
install() { DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}" >>"$log" 2>&1; }
if ! install; then
    { apt-get update >>"$log" 2>&1 && install; } || { tail -n 3 "$log" >&2 && exit 1; }
fi
