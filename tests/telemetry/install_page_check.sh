#!/usr/bin/env bash
# Installs Debian's prometheus and chromium for the tests of the dashboard's page: on Debian and its kin, for root, if
# they are not there; those tests are skipped without them. Runs beside the first tests: it makes the file DONE when it
# has ended, whatever came of it.
# Usage: install_page_check.sh DONE

set -uo pipefail
trap 'touch "$1"' EXIT
command -v prometheus >/dev/null && command -v chromium >/dev/null && exit 0
[[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || exit 0

# Debian would start a Prometheus of its own with the package.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy
    trap 'rm -f $policy; touch "$1"' EXIT
fi
install() {
    DEBIAN_FRONTEND=noninteractive timeout 240 apt-get install -y --no-install-recommends \
        -o DPkg::Lock::Timeout=120 -o Dpkg::Options::=--force-unsafe-io prometheus chromium
}
{ install || { apt-get update && install; }; } </dev/null >"$1.log" 2>&1
