"""What a run of a week meets: kills, full disks, damage, bad input, ranks that stop, attacks; each tried many times.

    make campaign                      or: python -m tests.campaign --out FOLDER [--only kills storage]

Each part is a module with `trials()`. What a trial found is in `FOLDER/trials.jsonl` when it ends, so that a campaign
that was stopped goes on where it was. Two parts are tried at once (`--jobs`). Kills while vLLM draws want what
`make test-vllm` sets up. The committed results are `bench/results/campaign.md`.
"""
