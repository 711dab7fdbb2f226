#!/bin/sh
# Makes .venv with what the demo needs; `setup.sh test` adds what lint and the tests need.
# TORCH chooses the build of torch:
#   auto    cuda where nvidia-smi lists a GPU, else cpu (the default; later runs keep the choice)
#   cpu     the CPU build, from where pip already looks or from PyTorch's own index of CPU builds
#   cuda    the CUDA build: several GB
#   system  installs nothing: .venv sees the packages of the Python that makes it
# PYTHON names another interpreter than the first on the path that is new enough.
set -eu
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

before=$(cat .venv/.torch 2>/dev/null || true)
choice=${TORCH:-${before:-auto}}
case $choice in
    auto) if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then build=cuda; else build=cpu; fi ;;
    cpu | cuda | system) build=$choice ;;
    *) die "TORCH=$choice is unknown; known: auto, cpu, cuda, system" ;;
esac

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
for python in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14} ''; do
    new_enough "$python" && break
done
[ "$python" ] || die "Python 3.11 or newer is needed, but \`${PYTHON:-python3} --version\` says:" \
    "$("${PYTHON:-python3}" --version 2>&1 | tail -n 1); name another with PYTHON=/path/to/python3"

make_venv() { # MODULE-IT-NEEDS [OPTIONS]
    "$python" -c "import $1" 2>/dev/null ||
        die "$python comes without its module $1; on Debian and Ubuntu: apt install python3-venv"
    shift
    say "making .venv with $python, $("$python" --version)"
    # Builds of torch do not replace one another cleanly: another choice starts from nothing.
    begun=$(cat .venv/.begun .venv/.torch 2>/dev/null | head -n 1)
    [ "${begun:-$choice}" = "$choice" ] || rm -rf .venv
    "$python" -m venv "$@" .venv
    echo "$choice" >.venv/.begun
}

pip() { .venv/bin/python -m pip "$@"; }

# Downloads and unpacking take minutes of which pip says nothing to a pipe. Ends with this script,
# however that ends.
grow() {
    while sleep 10 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        say "  $(($(du -sk .venv 2>/dev/null | cut -f1) / 1024)) MB in .venv"
    done
}

# Of pip's hundreds of lines those on packages above a megabyte; from an error on, all of them.
retell() {
    set -f
    failing=
    while IFS= read -r line; do
        case $line in
            'pip failed') return 1 ;;
            *ERROR:* | *error:*) failing=yes ;;
            *WARNING:*Retrying*) echo "$line" >&2 ;;
        esac
        [ -z "$failing" ] || echo "$line" >&2
        set -- $line
        case $line in
            *Downloading*' MB)' | *'Using cached'*' MB)')
                while [ $# -gt 3 ]; do shift; done
                size="$2 $3" ;;
            Processing*.whl*)
                bytes=$(wc -c <"$2") && [ "$bytes" -ge 1000000 ] || continue
                size="($((bytes / 1000000)) MB)"
                shift ;;
            'Installing collected packages:'*) say "  unpacking $(($# - 3)) packages"; continue ;;
            *) continue ;;
        esac
        wheel=${1##*/}
        version=${wheel#*-}
        say "  ${wheel%%-*} ${version%%-*} $size"
    done
}

install() { # WHAT OPTIONS
    say "installing $1 into .venv"
    shift
    rm -rf .venv/tmp && mkdir .venv/tmp
    grow &
    growing=$!
    { TMPDIR=$PWD/.venv/tmp pip install "$@" 2>&1 || echo 'pip failed'; } | retell || failed=yes
    kill $growing
    rm -rf .venv/tmp
    [ -z "${failed:-}" ]
}

# What the demo needs. pip would compile ten times what is ever imported; Python does it on the way,
# or now, if it is told to write nothing later.
install_core() { # BUILD OPTIONS
    core="the $1 build of torch and what the demo needs"
    shift
    install "$core" --no-compile "$@" -e . || return 1
    [ -z "${PYTHONDONTWRITEBYTECODE:-}" ] ||
        PYTHONDONTWRITEBYTECODE='' .venv/bin/python -c 'import torch, triton, PIL.Image, rich'
}

site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# A folder on the path in which this checkout has the package's name: type checkers look through
# folders, not through the finder of an editable install. It is no link in site-packages itself:
# through that a later `pip install .` would write into the checkout.
show_checkout() {
    mkdir -p .venv/checkout
    ln -sfn ../.. .venv/checkout/alexnet_triton
    echo "$PWD/.venv/checkout" >"$(site .venv/bin/python)/alexnet_triton_checkout.pth"
}

# Asks before installing, since pip would otherwise fall back on several GB of CUDA wheels.
install_cpu() {
    wheel="$(grep '^torch==' requirements/cpu.txt)+cpu"
    offered() {
        pip install -qq --dry-run --no-deps --timeout 15 --retries 1 "$@" "$wheel" >/dev/null 2>&1
    }
    say "looking for the CPU build, $wheel"
    index='--extra-index-url https://download.pytorch.org/whl/cpu'
    if offered; then index=; elif ! offered $index; then
        die "no CPU build of torch could be reached ($wheel for $(.venv/bin/python --version));" \
            "\`make demo TORCH=cuda\` accepts several GB of CUDA wheels"
    fi
    install_core "CPU" $index -c requirements/cpu.txt
}

install_cuda() {
    install_core "CUDA" ||
        die "the CUDA build could not be installed; TORCH=system uses a torch that is already there"
}

# The LPIPS that ours is held against, without the torchvision and SciPy that it asks for: the former
# would bring another build of torch, and what it computes needs neither.
install_lpips() { install "lpips 0.1.4" --no-deps lpips==0.1.4; }

# A venv made by a venv's Python sees what lies below that venv but not what is in it: the .pth adds
# that.
borrow_packages() {
    site "$python" >"$(site .venv/bin/python)/system.pth"
    show_checkout
    missing=$(.venv/bin/python -c 'import sys; from importlib.util import find_spec
print(*(name for name in sys.argv[1:] if not find_spec(name)))' \
        torch triton numpy PIL safetensors rich threadpoolctl)
    [ -z "$missing" ] || die "TORCH=system installs nothing, and $python lacks: $missing"
}

case $build${1:+-$1} in
    cpu) make_venv ensurepip; install_cpu; show_checkout ;;
    cuda) make_venv ensurepip; install_cuda; show_checkout ;;
    system) make_venv venv --system-site-packages --without-pip; borrow_packages ;;
    cpu-test) install "what lint and the tests need" -c requirements/cpu.txt -e '.[test]'; install_lpips ;;
    cuda-test) install "what lint and the tests need" -e '.[test]'; install_lpips ;;
    system-test) ;; # what is there must do
esac
[ "${1:-}" ] || echo "$choice" >.venv/.torch # only now: a choice that failed is not kept
