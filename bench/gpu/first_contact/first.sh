#!/usr/bin/env bash
# first.sh DIR, less than 290 s: what this machine is, the loss head's pieces one by one, correctness. Leaves DIR/1.tar.gz.
. "$(dirname "${BASH_SOURCE[0]}")/contact.sh"
begin 1 "$1"
command -v nvidia-smi > /dev/null && nvidia-smi -L
"$python" -c "import numpy, torch, transformers, triton; print(*(m.__name__ + ' ' + m.__version__ for m in (numpy, torch, transformers, triton)))"
bounded 110 probe "$python" -m bench.gpu.first_contact.probe "$out/probe.jsonl"
tail -45 "$out/probe.log" | cut -c1-240
suite 160 1 environment correctness
grep -E "checks passed|FAILED|failures|left_out|checks_failed|Error" "$out/suite1.log" | cut -c1-300 | head -40
pack
