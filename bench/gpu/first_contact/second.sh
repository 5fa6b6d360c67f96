#!/usr/bin/env bash
# second.sh DIR, less than 220 s: the loss head beside its peers and the bare products, where its time goes, other
# settings. Leaves DIR/2.tar.gz.
. "$(dirname "${BASH_SOURCE[0]}")/contact.sh"
begin 2 "$1"
packages .carry/peers
suite 205 2 kernels
tail -90 "$out/suite2.log" | cut -c1-150
pack
