#!/usr/bin/env bash
# From a clean clone to a trained model: set-up, then launch/quickstart.py, which does the work.

set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'EOF'
Usage: bash launch/quickstart.sh [--model MODEL] [--dir FOLDER] [--no-venv] [--SECTION.KEY VALUE ...]

Sets up, trains a tokenizer on the shipped corpus, builds the datasets, pretrains a small model on two processes,
measures its held-out perplexity and draws its curves. What exists is not made again: a second run shows the result, an
interrupted one goes on from its last checkpoint. About ten minutes on two CPU cores, installing included.

  --model MODEL    implicit_mamba2 (default), implicit_llama, explicit_mamba2 or explicit_llama
  --dir FOLDER     where data/ and the run's folder go (default: runs/quickstart)
  --no-venv        use the current Python instead of .venv (see launch/setup.sh --help)
  --SECTION.KEY    configuration of the training, e.g. --train.steps 100 (see launch/pretrain.py --help)
EOF
}

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

setup=() arguments=()
while (($#)); do
    option=$1 value=${2-}
    shift
    case $option in
        -h | --help) usage && exit 0 ;;
        --no-venv)
            setup+=("$option")
            continue
            ;;
        --*=*) value=${option#*=} option=${option%%=*} ;;
        --*)
            (($#)) || fail "$option needs a value (see bash launch/quickstart.sh --help)"
            shift
            ;;
    esac
    case $option in
        --model)
            case $value in
                implicit_mamba2 | implicit_llama | explicit_mamba2 | explicit_llama) ;;
                *) fail "--model $value: expected implicit_mamba2, implicit_llama, explicit_mamba2 or explicit_llama" ;;
            esac
            ;;
        --dir) [[ $value == /* ]] || value=$called_from/$value ;;
        --run.dir | --data.path | --config) fail "$option cannot be set here: --dir moves the whole quickstart" ;;
        --*.*) ;;
        *) fail "unknown argument '$option' (see bash launch/quickstart.sh --help)" ;;
    esac
    arguments+=("$option=$value")
done

python=$(bash launch/setup.sh --print-python ${setup[@]+"${setup[@]}"})
exec "$python" launch/quickstart.py ${arguments[@]+"${arguments[@]}"}
