#!/usr/bin/env bash
# From the root of a checkout: fills .carry/ with the three scripts and the wheels that a bare GPU machine lacks for
# DeepSpeed, the trainer and the peers (Python 3.12, x86-64, a few MB), and has git ignore it. See README.md beside this
# file.
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-.venv/bin/python}
wheels=.carry/wheels peers=.carry/peers
mkdir -p "$wheels" "$peers"
exclude=$(git rev-parse --git-path info/exclude)
mkdir -p "$(dirname "$exclude")"
grep -qx '/.carry/' "$exclude" 2>/dev/null || echo '/.carry/' >> "$exclude"
cp "$here"/first.sh "$here"/second.sh "$here"/third.sh "$here"/contact.sh .carry/
if [ "${WHEELS:-yes}" = yes ]; then
  download() {
    local folder=$1
    shift
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$folder" "$@"
  }
  DS_BUILD_OPS=0 "$python" -m pip wheel -q --no-deps --no-build-isolation deepspeed==0.19.8 -w "$wheels"
  download "$wheels" annotated-types==0.8.0 docstring-parser==0.18.0 hjson==3.1.0 jsonargparse==4.53.0 \
    pydantic==2.14.3 pydantic-core==2.50.4 typing-inspection==0.4.5
  # multiprocess has a wheel for each Python.
  download "$peers" $(grep -E '^(cut-cross-entropy|liger-kernel|trl|datasets|dill|multiprocess)==' requirements.lock)
fi
du -sh .carry
