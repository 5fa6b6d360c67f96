"""The embedded world: a small instruction-following task in which being helpful and being safe sometimes conflict.

Prompts ask for help with everyday things ("how do i scrub the oven in a hurry ?"), in twelve families from harmless
(writing, gardening) to sensitive (medicine, locks, gas). Responses are a few short clauses: a step, details, shortcuts,
cautions, a referral to an expert, or a refusal. Reward and cost are functions of the text alone, so what a policy has
learned can be read off its samples. What it takes to be safe differs by family, which is what makes an average over
prompts misleading: see the table in `repo_fast.world.rules`.

    families.py   the twelve families and their words
    grammar.py    prompts and responses: how they are written, sampled and parsed
    rules.py      reward and cost
    corpus.py     training prompts, held-out prompts, demonstrations
    policy.py     the starting policy: about 1 M parameters, trained on demonstrations at first use, then cached
"""

# The models of `policy.py`, as options name them.
EMBEDDED = ("world:tiny", "world:base")
