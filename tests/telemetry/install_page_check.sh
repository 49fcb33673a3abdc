#!/usr/bin/env bash
# Installs what the tests of the dashboard's page need (Debian's prometheus and chromium) where that is possible:
# as root with apt. Ends with 0 whatever happens; a test without them is skipped. DONE is made when nothing more comes.
# Usage: install_page_check.sh DONE
done_file=$1
have() { command -v prometheus >/dev/null && command -v chromium >/dev/null; }
if ! have && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    install() {
        apt-get install -y -q --no-install-recommends -o DPkg::Lock::Timeout=300 -o Dpkg::Options::=--force-unsafe-io \
            prometheus chromium
    }
    # Debian starts a Prometheus with its package; that one would only be in the way.
    policy=/usr/sbin/policy-rc.d
    [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' > $policy; chmod +x $policy; made=1; }
    { timeout 240 bash -c "$(declare -f install); install" || { apt-get update -q && timeout 240 bash -c "$(declare -f install); install"; }; } </dev/null >"$done_file.log" 2>&1
    [ -z "${made:-}" ] || rm -f $policy
fi
touch "$done_file"
