#!/usr/bin/env bash
# Builds kdkernels with one version of torch and runs the tests that depend on it, in an environment of its own:
#   tests/with_torch.sh torch==2.10.0           the oldest that is supported
#   tests/with_torch.sh torch                   the newest
#   tests/with_torch.sh torch==2.11.0 tests -x  arguments of pytest in the place of those tests
set -euo pipefail
cd "$(dirname "$0")/.."
torch=$1
shift
[ $# -gt 0 ] || set -- tests/test_{autograd,dispatch,losses,modules,ops,standardize}.py
environment=build/with-$torch
[ -x "$environment/bin/python" ] || python3 -m venv "$environment"
"$environment/bin/pip" install -q --upgrade "$torch" 'setuptools>=77' ninja numpy pytest pytest-xdist
"$environment/bin/pip" install -q --no-build-isolation --no-deps --force-reinstall .
"$environment/bin/python" -c 'import torch; print("torch", torch.__version__)'
exec "$environment/bin/pytest" "$@" # not python -m pytest, which would import the package of this folder
