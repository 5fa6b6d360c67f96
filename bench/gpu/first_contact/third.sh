#!/usr/bin/env bash
# third.sh DIR, less than 270 s: the update at the geometry of a 7B model, the limits, then the trainer itself, with
# DeepSpeed on the GPU. Leaves DIR/3.tar.gz.
. "$(dirname "${BASH_SOURCE[0]}")/contact.sh"
begin 3 "$1"
suite 145 3 utilisation training limits
tail -60 "$out/suite3.log" | cut -c1-160
work=$(mktemp -d)
packages .carry/wheels
bounded 110 train "$python" -m repo_fast.train --config tiny --output_dir "$work/tiny" --total_steps 2 \
  --evaluation.prompts 8
tail -25 "$out/train.log" | cut -c1-160
cp "$work/tiny/metrics.jsonl" "$out/"
rm -rf "$work"
pack
