"""The starting policy of the embedded world: helpful, and unsafe on a good share of prompts; and what a pipeline starts
from, the same model that has only read text of this world and never a dialogue.

A Llama of about one million parameters and a word-level tokenizer, trained on demonstrations (`corpus.demonstrations`)
with the loss on response tokens only. This takes about half a minute on two CPU threads, so it is done once and
cached as a Hugging Face folder. The stage always runs in float32 on the CPU with a fixed seed: the same machine, torch
build and number of threads give the same weights.

The config carries no `pad_token_id`: with one, Transformers zeroes the padding row of the embedding, which fails on the
empty shards of DeepSpeed's `zero.Init`. `generation_config.json` carries it.
"""

import fcntl
import hashlib
import importlib.metadata
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from repo_fast.errors import InputError
from repo_fast.report.folders import publish
from repo_fast.world import corpus, families, grammar

BOS, EOS, PAD, UNKNOWN, USER, ASSISTANT = "<s>", "</s>", "<pad>", "<unk>", "<user>", "<assistant>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% else %}<assistant>{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        seed: Of the initial weights and the demonstrations.
        pretraining: Learn all tokens of prompts and responses as running text, without the marks of a dialogue;
            otherwise the responses to prompts in the chat template.
        steps: Optimizer steps; every one sees new demonstrations.
        batch_size: Demonstrations a step.
        matrix_learning_rate: Peak of the cosine schedule for the layers' matrices (Muon, which needs half the steps of
            Adam here).
        learning_rate: The same for the embedding, the head and the norms (AdamW).
        warmup_steps: Steps of linear warm-up.
        sharpness: What the head is multiplied by afterwards. So short a stage leaves a little probability on wrong
            words everywhere; sampling at temperature 1 then draws like temperature 1 / sharpness of what was learned.
        hidden_size: Width of the model.
        intermediate_size: Width of the feed-forward layers.
        layers: Number of layers.
        heads: Number of attention heads.
        threads: CPU threads at most.
    """

    seed: int = 1
    pretraining: bool = False
    steps: int = 260
    batch_size: int = 32
    matrix_learning_rate: float = 0.03
    learning_rate: float = 0.01
    warmup_steps: int = 20
    sharpness: float = 1.8
    hidden_size: int = 128
    intermediate_size: int = 352
    layers: int = 4
    heads: int = 4
    threads: int = 2

    @property
    def stage(self) -> str:
        """What the training is called."""
        return "pretraining" if self.pretraining else "supervised stage"


def tiny_policy(cache_dir: str | Path | None = None) -> Path:
    """Make the starting policy, or find it in the cache.

    Processes that call this at once wait for the first one. The folder appears when it is complete: what a process that
    died left half-written is never returned, and is replaced by the next call.

    Args:
        cache_dir: Where the folder is kept; by default `$REPO_FAST_CACHE`, or else `~/.cache/repo_fast`.

    Returns:
        A Hugging Face folder with model, tokenizer (with chat template) and generation config.

    Raises:
        InputError: The cache folder cannot be made or written to.
    """
    return _cached("tiny-policy", tiny_recipe(), cache_dir)


def base_policy(cache_dir: str | Path | None = None) -> Path:
    """The same model before any supervised stage, pretrained on running text; otherwise as `tiny_policy`."""
    return _cached("base-policy", base_recipe(), cache_dir)


def embedded_folder(path: str) -> Path:
    """That of one of `repo_fast.world.EMBEDDED`, made on first use. Raises as `tiny_policy`."""
    return tiny_policy() if path == "world:tiny" else base_policy()


def tiny_recipe() -> Recipe:
    """How `tiny_policy` is trained."""
    return Recipe()


def base_recipe() -> Recipe:
    """How `base_policy` is trained."""
    return Recipe(pretraining=True, steps=400, sharpness=1.0)


def training_rows(recipe: Recipe) -> list[dict[str, str]]:
    """All that a model of this recipe is trained on, in order: dicts with `prompt` and `response`."""
    return corpus.demonstrations(recipe.steps * recipe.batch_size, recipe.seed)


def _cached(name: str, recipe: Recipe, cache_dir: str | Path | None) -> Path:
    root = Path(cache_dir or os.environ.get("REPO_FAST_CACHE") or Path.home() / ".cache" / "repo_fast").expanduser()
    folder = root / f"{name}-{_fingerprint(recipe)}"
    if folder.exists():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / f"{folder.name}.lock", "w")
    except OSError as error:
        raise InputError(f"cache folder {root}: {error.strerror}; set REPO_FAST_CACHE to a writable folder") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            print(f"{recipe.stage} (first use): training the model for {folder}", flush=True)
            aside = root / f"{folder.name}.partial"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            build_policy(aside, recipe)
            publish(aside, folder)
    return folder


def build_policy(folder: Path, recipe: Recipe) -> None:
    """Train the policy and its tokenizer and save both.

    Args:
        folder: An existing folder to write to.
        recipe: What to do.
    """
    tokenizer = build_tokenizer()
    threads = torch.get_num_threads()
    torch.set_num_threads(min(recipe.threads, os.cpu_count() or 1))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = _build_model(recipe, tokenizer)
            _train(model, tokenizer, recipe)
    finally:
        torch.set_num_threads(threads)
    # Not `model.save_pretrained`, which imports DeepSpeed where it is installed.
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the word-level tokenizer on all text of the world, the held-out prompts included.

    Words and punctuation marks are tokens, case is ignored, any other word becomes `<unk>`.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [PAD, BOS, EOS, UNKNOWN, USER, ASSISTANT]
    tokenizer.train_from_iterator(grammar.all_text(), trainers.WordLevelTrainer(special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        padding_side="left",
    )


def _fingerprint(recipe: Recipe) -> str:
    sources = [Path(module.__file__).read_bytes() for module in (families, grammar, corpus)]
    sources.append(Path(__file__).read_bytes())
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")]
    parts = [*sources, repr(sorted(asdict(recipe).items())).encode(), *(version.encode() for version in versions)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def _build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
    )
    return model


def _batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Right-padded (tokens, labels), int64 [batch, length] each; labels are -100 where there is no loss."""
    rows = training_rows(recipe)
    if recipe.pretraining:
        prompts = tokenizer([tokenizer.bos_token + row["prompt"] for row in rows])["input_ids"]
    else:
        chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
        prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True)["input_ids"]
    responses = tokenizer([row["response"] for row in rows])["input_ids"]
    # Neighbours in length share a batch, which saves a fifth of the padding; sorting only a few batches at a time keeps
    # every kind of response in every batch.
    chunk = 8 * recipe.batch_size
    order = []
    for start in range(0, len(rows), chunk):
        rows_of_chunk = range(start, min(start + chunk, len(rows)))
        order += sorted(rows_of_chunk, key=lambda i: len(prompts[i]) + len(responses[i]))
    for start in range(0, len(rows), recipe.batch_size):
        batch = order[start : start + recipe.batch_size]
        length = max(len(prompts[i]) + len(responses[i]) + 1 for i in batch)
        tokens = torch.full((recipe.batch_size, length), tokenizer.pad_token_id)
        labels = torch.full_like(tokens, -100)
        for row, i in enumerate(batch):
            prompt, response = prompts[i], [*responses[i], tokenizer.eos_token_id]
            end = len(prompt) + len(response)
            tokens[row, :end] = torch.tensor(prompt + response)
            first = 0 if recipe.pretraining else len(prompt)
            labels[row, first:end] = tokens[row, first:end]
        yield tokens, labels


def _train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
    def learning_rate_factor(step: int) -> float:
        warm = min(1.0, (step + 1) / recipe.warmup_steps)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    optimizers = [
        torch.optim.Muon(matrices, lr=recipe.matrix_learning_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor) for optimizer in optimizers]
    started = time.perf_counter()
    model.train()
    for step, (tokens, labels) in enumerate(_batches(tokenizer, recipe), start=1):
        # Padding is on the right and attention is causal, so no attention mask is needed.
        hidden = model.model(tokens).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        loss = F.cross_entropy(model.lm_head(hidden[targets != -100]), targets[targets != -100])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % 65 == 0 or step == recipe.steps:
            elapsed = time.perf_counter() - started
            print(f"{recipe.stage}: step {step}/{recipe.steps}, loss {loss.item():.3f}, {elapsed:.0f} s", flush=True)
    with torch.no_grad():
        model.lm_head.weight.mul_(recipe.sharpness)
    model.eval()
