#!/usr/bin/env bash
# The Python environment of the quick start and the tests. Run it to install, source it to also use what it installed.
#   Uses the active virtual environment, or makes `.venv` in the repository. Installs only what the environment lacks of
#   requirements/cpu-py3XX.txt (pinned, with hashes) and torch's CPU build.
#   MEGATRON_ESPO_ALLOW_CUDA_TORCH=1   accept torch's CUDA build (several GB) where the package index has no CPU build
# No `set -e` here: it would stay on in the shell that sources this file.

espo_torch=2.13.0

espo_say() { echo "env: $*"; }
espo_fail() { echo "env: error: $*" >&2; return 1; }

espo_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# Puts a virtual environment with Python 3.11 or 3.12 first on PATH.
espo_activate() {
    local root=$1 folder=${VIRTUAL_ENV:-$1/.venv} candidate
    if [ -n "${VIRTUAL_ENV:-}" ] || [ -e "$folder" ]; then
        case "$(espo_version "$folder/bin/python")" in
            3.11 | 3.12) ;;
            *) espo_fail "the environment $folder has Python '$(espo_version "$folder/bin/python")', expected 3.11 or 3.12:" \
                "run 'deactivate', or remove a .venv; then this script makes .venv"; return ;;
        esac
        if [ -z "${VIRTUAL_ENV:-}" ] && [ ! -x "$folder/bin/pip" ]; then
            espo_fail "$folder has no pip: remove it, and this script makes one; or activate it"; return
        fi
    else
        for candidate in python3.11 python3.12 python3 ""; do
            case "$(espo_version "$candidate")" in 3.11 | 3.12) break ;; esac
        done
        if [ -z "$candidate" ]; then
            espo_fail "no Python 3.11 or 3.12 on PATH (python3 is '$(espo_version python3)'): install one," \
                "or activate a virtual environment that has one"; return
        fi
        espo_say "making .venv with $candidate"
        "$candidate" -m venv "$folder" || return
    fi
    export VIRTUAL_ENV="$folder"
    export PATH="$VIRTUAL_ENV/bin:$PATH"
}

# Installs torch's CPU build. A dry run first shows which build the index has.
espo_install_torch() {
    local build
    build=$(python -m pip install -qq --dry-run --ignore-installed --no-deps --report - "torch==$espo_torch" |
        python -c '
import json, sys
needs = json.load(sys.stdin)["install"][0]["metadata"].get("requires_dist", [])
print("cuda" if any(need.startswith(("nvidia-", "cuda-")) for need in needs) else "cpu")') ||
        { espo_fail "the package index has no torch $espo_torch for Python $(espo_version python)"; return; }
    if [ "$build" = cpu ]; then
        espo_say "installing torch $espo_torch (CPU build)"
        python -m pip install -qq --no-deps "torch==$espo_torch"
    elif [ "${MEGATRON_ESPO_ALLOW_CUDA_TORCH:-0}" = 1 ]; then
        espo_say "installing torch $espo_torch (CUDA build, several GB)"
        python -m pip install -qq "torch==$espo_torch"
    else
        espo_fail "this machine's package index has only the CUDA build of torch $espo_torch (several GB)." \
            $'\n  CPU build:   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash tools/env.sh' \
            $'\n  CUDA build:  MEGATRON_ESPO_ALLOW_CUDA_TORCH=1 bash tools/env.sh'
    fi
}

# Puts Megatron-Core's wheel for Python 3.12 into Python 3.11. Its metadata asks for 3.12, but its Python code runs on 3.11,
# for which some package indexes have torch's CPU build. Its compiled module, which this package does not use, does not load.
espo_install_megatron() {
    local folder status=0
    folder=$(mktemp -d) || return
    {
        python -m pip install -qq --no-deps --require-hashes --only-binary :all: --ignore-requires-python \
            --python-version 3.12 --no-compile --target "$folder" -r "$1" &&
            python -m pip uninstall -qq -y megatron-core &&
            cp -R "$folder/." "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    } || status=$?
    rm -rf "$folder"
    return "$status"
}

# Installs the missing ones of the pinned packages, torch and this repository.
espo_install() {
    local root=$1 pins=$2 megatron=$1/requirements/megatron-core-py311.txt lacking torch
    [ "$(espo_version python)" = 3.11 ] || megatron=
    lacking=$(python "$root/tools/missing_packages.py" "$root" "$pins" ${megatron:+"$megatron"}) || return
    torch=$(python -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null)
    case "$torch" in
        "$espo_torch"*) ;;
        "") espo_install_torch || return ;;
        *) espo_fail "$VIRTUAL_ENV has torch $torch, expected $espo_torch: use another environment" \
            "(run 'deactivate', and this script makes .venv)"; return ;;
    esac
    if [ -n "${lacking%megatron-espo}" ]; then
        espo_say "installing $(grep -c == <<<"$lacking") pinned packages into $VIRTUAL_ENV (minutes, the first time)"
        # --no-deps: the list is complete, and torch's companions must stay out (see requirements/cpu-overrides.txt).
        python -m pip install -qq --no-deps --require-hashes -r "$pins" || return
        case "${megatron:+$lacking}" in *megatron-core==*) espo_install_megatron "$megatron" || return ;; esac
    fi
    if [ -n "$lacking" ]; then
        espo_say "installing megatron-espo from $root"
        python -m pip install -qq --no-deps --no-build-isolation -e "$root" || return
    fi
}

espo_env() {
    local root pins
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return
    espo_activate "$root" || return
    if python -c 'from importlib.metadata import version; version("vllm")' 2>/dev/null; then
        espo_say "$VIRTUAL_ENV has vLLM's GPU build: using it as it is"
        return
    fi
    pins="$root/requirements/cpu-py$(espo_version python | tr -d .).txt"
    # The lock keeps two first runs from installing at the same time; it ends with the subshell.
    # shellcheck disable=SC2094 # flock locks the file it is given; nothing writes to it
    (flock 9 && espo_install "$root" "$pins") 9<"$pins" || return
    espo_say "ready: $VIRTUAL_ENV"
}

espo_env
