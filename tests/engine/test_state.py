"""What an engine saves is read by any number of ranks, in any stage; on as many it goes on to the same bits."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from repo_fast.checkpoints.files import sum_of
from repo_fast.checkpoints.pieces import PieceReader
from repo_fast.config import EngineConfig, LoraConfig, ModelConfig, OptimizerConfig
from repo_fast.data import load_tokenizer
from repo_fast.engine import Engine, fragments, start_distributed, stop_distributed
from repo_fast.engine.conversion import convert_engine
from repo_fast.engine.library import deepspeed
from repo_fast.engine.saved import STATE_FILE, Saved
from repo_fast.errors import InputError
from repo_fast.jobs.assembly import load_policy
from repo_fast.models.loss_head import Projection
from repo_fast.ops import linear_log_probs
from repo_fast.packing.rows import PackedBatch, pack
from tests.job_runs import on_ranks, same_bits
from tests.tiny import save_policy

PLAIN = EngineConfig(dtype="float32", parameter_persistence_threshold=0)
SETTINGS = {
    "stage 1": replace(PLAIN, zero_stage=1),
    "stage 2": replace(PLAIN, zero_stage=2),
    "stage 3": PLAIN,
    "stage 3, small parameters whole": replace(PLAIN, parameter_persistence_threshold=10_000),
    "stage 1, bfloat16": replace(PLAIN, zero_stage=1, dtype="bfloat16"),
    "stage 2, bfloat16": replace(PLAIN, zero_stage=2, dtype="bfloat16"),
    "stage 3, bfloat16": replace(PLAIN, dtype="bfloat16"),
    "stage 2, offload": replace(PLAIN, zero_stage=2, offload_optimizer=True),
    "stage 3, offload": replace(PLAIN, offload_optimizer=True, offload_parameters=True),
    "stage 2, adapters": replace(PLAIN, zero_stage=2),
    "stage 3, adapters": PLAIN,
}
# A checkpoint's way: ranks and stage of each that reads it and writes it anew, without a step between.
WAY = ((1, 3), (2, 1), (3, 2), (1, 3))
# Warm-up, decay of the rate, two groups of weights, and a gradient that is clipped.
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup=0.2, gradient_clip=0.5)
LEARNED = [
    ([3, 9, 14], [15, 16, 17, 2]),
    ([5, 8], [20, 9]),
    ([12, 13, 14, 15, 16, 17, 18], [19, 20, 21, 22, 23, 24, 9, 10, 11, 2]),
]


class OnRank:
    """What each rank does."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ranks = folder, start_distributed()
        own = LEARNED[self.ranks.rank :: self.ranks.size]
        self.batch = pack([torch.tensor(p) for p, _ in own], [torch.tensor(r) for _, r in own], self.ranks.device)

    def engine(self, config: EngineConfig, adapters: bool = False, model: str = "policy") -> Engine:
        path = str(self.folder / model)
        lora = LoraConfig(rank=2) if adapters else LoraConfig()
        torch.manual_seed(0)
        policy = load_policy(path, load_tokenizer(path), ModelConfig(lora=lora), config, self.ranks)
        return Engine(policy, config, self.ranks, OPTIMIZER, steps=8)

    def steps(self, engine: Engine, count: int) -> None:
        for _ in range(count):
            engine.backward(engine(self.batch, loss), last=True)
            assert engine.step().applied

    def saved(self, engine: Engine, name: str) -> Path:
        folder = self.folder / name
        for file, known in engine.unsaved().write(folder).items():
            assert sum_of(folder / file) == known
        self.ranks.barrier()
        return folder


def loss(hidden: torch.Tensor, projection: Projection, packed: PackedBatch) -> torch.Tensor:
    return -linear_log_probs(hidden, projection.weight, packed.targets).sum() / 16


def measure(folder: Path) -> dict[str, Any]:
    """By setting: weights after six steps at once, and after three, a checkpoint and three more."""
    on = OnRank(folder)
    found: dict[str, Any] = {}
    for name, config in SETTINGS.items():
        adapters = "adapters" in name
        engine = on.engine(config, adapters)
        on.steps(engine, 3)
        saved = on.saved(engine, f"{on.ranks.size} ranks, {name}")
        found[name] = {"books": None if on.ranks.size == 1 else unlike_deepspeeds(engine)}
        found[name]["converted"] = unlike_converted(on, engine, saved)
        found[name]["rate"] = engine._schedule.get_last_lr()
        on.steps(engine, 3)
        found[name]["at once"] = engine.whole_state()
        engine = on.engine(config, adapters)
        before = engine.whole_state()
        engine.load(saved)
        found[name]["rate again"] = engine._schedule.get_last_lr()
        on.steps(engine, 3)
        found[name]["resumed"] = engine.whole_state()
        found[name]["moved"] = not same_bits(before, found[name]["resumed"])
    if on.ranks.size == 1:
        found["refused"], found["of before"] = refused(on), of_before(on)
        found["in float32"], found["in bfloat16"] = (
            adapters_in(on, SETTINGS[name]) for name in ("stage 2", "stage 2, bfloat16")
        )
    stop_distributed()
    return found


def unlike_converted(on: OnRank, engine: Engine, saved: Path) -> list[str]:
    """What is not the same in what DeepSpeed saves, converted. On the first rank."""
    theirs, converted = saved.with_name(f"{saved.name}, DeepSpeed's"), saved.with_name(f"{saved.name}, converted")
    engine._engine.save_checkpoint(str(theirs), tag="state", save_latest=False)
    on.ranks.barrier()
    if not on.ranks.is_first:
        return []
    for file, known in convert_engine(theirs / "state", converted).items():
        assert sum_of(converted / file) == known
    ours, other = Saved.read(saved), Saved.read(converted)
    unlike = [
        key
        for key in ("adam_step", "dtype", "schedule", "frozen", "frozen_rounded", "buffers")
        if getattr(ours, key) != getattr(other, key)
    ]
    with PieceReader(saved) as mine, PieceReader(converted) as its:
        for name in ours.parameters.keys() | other.parameters.keys():
            for key in (fragments.WEIGHT, *fragments.MOMENTS):
                pair = [
                    reader.whole(f"{name}/{key}", state.parameters[name])
                    for reader, state in ((mine, ours), (its, other))
                ]
                if not torch.equal(*pair):
                    unlike.append(f"{name}/{key}")
    return unlike


def unlike_deepspeeds(engine: Engine) -> list[str]:
    """What its fragments do not give as DeepSpeed's own functions do, which give whole tensors.

    Those of moments fail on some ranks in ZeRO 1 and 2, where a rank has nothing of a group.
    """
    optimizer, unlike = engine._engine.optimizer, []
    mine = {part.name: part for part in fragments.fragments(optimizer, engine.module)}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        whole = {fragments.WEIGHT: deepspeed.utils.safe_get_full_fp32_param(parameter)}
        if hasattr(parameter, "ds_id"):
            whole |= {key: deepspeed.utils.safe_get_full_optimizer_state(parameter, key) for key in fragments.MOMENTS}
        if name in mine:
            part = mine[name]
            for key, value in whole.items():
                if not torch.equal(value.reshape(-1)[part.start : part.start + part.count], part.views[key]):
                    unlike.append(f"{name} {key}")
    return unlike


def of_before(on: OnRank) -> dict[str, str]:
    """What is said in bfloat16 of checkpoints in float32 that do not say what their frozen weights are, rounded."""
    said = {}
    for name in ("stage 2", "stage 2, adapters"):
        folder = shutil.copytree(on.folder / f"1 ranks, {name}", on.folder / f"{name}, of before")
        content = json.loads((folder / STATE_FILE).read_text())
        del content["frozen_rounded"]
        (folder / STATE_FILE).write_text(json.dumps(content))
        try:
            on.engine(SETTINGS["stage 2, bfloat16"], "adapters" in name).load(folder)
        except InputError as error:
            said[name] = str(error)
    return said


def adapters_in(on: OnRank, config: EngineConfig) -> dict[str, torch.Tensor]:
    """What those that were trained in float32 are for a model that computes in another dtype, too."""
    engine = on.engine(config, adapters=True)
    engine.load(on.folder / "1 ranks, stage 3, adapters")
    return {name: value for name, value in engine.whole_state().items() if "lora_" in name}


def refused(on: OnRank) -> dict[str, str]:
    """What is said of checkpoints of something else."""
    said = {}
    given = {
        "other weights trained": ("stage 2", "1 ranks, stage 2, adapters", False, "policy"),
        "another base": ("stage 2", "1 ranks, stage 2, adapters", True, "other"),
        "another base, in bfloat16": ("stage 2, bfloat16", "1 ranks, stage 2, adapters", True, "other"),
        "another shape": ("stage 2", "1 ranks, stage 2", False, "wide"),
    }
    for name, (setting, saved, adapters, model) in given.items():
        engine = on.engine(SETTINGS[setting], adapters, model)
        try:
            engine.load(on.folder / saved)
        except InputError as error:
            said[name] = str(error)
    return said


def move(folder: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint and write it anew, or, at the end of its way, take three steps; as `way.json` says."""
    on = OnRank(folder)
    way = json.loads((folder / "way.json").read_text())
    setting = way["setting"]
    engine = on.engine(replace(SETTINGS[setting], zero_stage=way["stage"]), "adapters" in setting)
    engine.load(folder / way["from"])
    if "to" in way:
        on.saved(engine, way["to"])
        state = {}
    else:
        on.steps(engine, 3)
        state = engine.whole_state()
    stop_distributed()
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    save_policy(folder / "policy")
    save_policy(folder / "other", seed=1)
    save_policy(folder / "wide", intermediate_size=48)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict[str, Any]]:
    return on_ranks(1, f"{__name__}:measure", folder)


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return on_ranks(2, f"{__name__}:measure", folder)


@pytest.fixture(params=["alone", "two"])
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_it_goes_on_to_the_same_bits(found: list[dict[str, Any]], name: str) -> None:
    first = found[0][name]
    assert first["moved"] and same_bits(first["at once"], first["resumed"])
    assert first["rate"] == first["rate again"]


@pytest.mark.parametrize("name", list(SETTINGS))
def test_fragments_are_what_deepspeed_gives_whole(found: list[dict[str, Any]], name: str) -> None:
    assert all(not rank[name]["books"] for rank in found)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_what_deepspeed_saves_is_converted(found: list[dict[str, Any]], name: str) -> None:
    assert found[0][name]["converted"] == []


def test_what_is_written(found: list[dict[str, Any]], folder: Path) -> None:
    """Every element of what is trained once, in float32, and nothing that is frozen."""
    ranks = len(found)
    for name in ("stage 1", "stage 2", "stage 3", "stage 2, adapters", "stage 3, bfloat16"):
        saved = folder / f"{ranks} ranks, {name}"
        files = [f"shard-{rank:05d}-of-{ranks:05d}.safetensors" for rank in range(ranks)]
        assert sorted(path.name for path in saved.iterdir()) == sorted([*files, STATE_FILE])
        state = json.loads((saved / STATE_FILE).read_text())
        assert any("lora_" in name for name in state["parameters"]) == ("adapters" in name)
        for pieces in state["parameters"].values():
            covered = sorted((start, start + count) for _, start, count in pieces["parts"])
            assert covered[0][0] == 0 and covered[-1][1] == math.prod(pieces["shape"])
            assert all(left[1] == right[0] for left, right in zip(covered, covered[1:], strict=False))
        written = [load_file(saved / file) for file in files]
        assert {value.dtype for file in written for value in file.values()} == {torch.float32}
        assert {key.rpartition("/")[0] for file in written for key in file} == state["parameters"].keys()


def test_a_base_in_shards_is_known_by_the_same_word(
    folder: Path, alone: list[dict[str, Any]], two: list[dict[str, Any]]
) -> None:
    """In either stage, on one rank as on two."""
    files = [folder / f"{n} ranks, stage {stage}, adapters" / STATE_FILE for n in (1, 2) for stage in (2, 3)]
    assert len({json.loads(file.read_text())["frozen"] for file in files}) == 1


@pytest.mark.parametrize("setting", ["stage 3", "stage 3, bfloat16", "stage 3, adapters"])
def test_a_checkpoint_goes_from_ranks_to_ranks(folder: Path, alone: list[dict[str, Any]], setting: str) -> None:
    """And from stage to stage; three steps at its end are those of a run that stayed."""
    name = f"1 ranks, {setting}"
    for number, (ranks, stage) in enumerate(WAY[1:], start=1):
        is_last = number == len(WAY) - 1
        way = {"from": name, "stage": stage, "setting": setting}
        way |= {} if is_last else {"to": f"{setting}, moved {number}"}
        (folder / "way.json").write_text(json.dumps(way))
        moved = on_ranks(ranks, f"{__name__}:move", folder)[0]
        name = way.get("to", "")
    assert same_bits(moved, alone[0][setting]["at once"])


def test_a_checkpoint_of_something_else_is_refused(alone: list[dict[str, Any]]) -> None:
    said = alone[0]["refused"]
    assert "is of another model: model.lm_head.weight is not trained there and [" in said["other weights trained"]
    assert "frozen weights that are not this model's, expected the same base" in said["another base"]
    assert "was trained in float32 beside frozen weights that are not" in said["another base, in bfloat16"]
    assert "expected the same base, and engine.dtype float32" in said["another base, in bfloat16"]
    assert "mlp.down_proj.weight is [" in said["another shape"]


def test_adapters_go_on_in_another_dtype(alone: list[dict[str, Any]]) -> None:
    """Beside the same base, which is rounded then."""
    before, after = alone[0]["in float32"], alone[0]["in bfloat16"]
    assert before and after and all(value.dtype == torch.bfloat16 for value in after.values())
    assert same_bits({name: value.bfloat16() for name, value in before.items()}, after)


def test_checkpoints_of_before_in_another_dtype(alone: list[dict[str, Any]]) -> None:
    """What is frozen cannot be compared then; where nothing is, nothing has to be."""
    said = alone[0]["of before"]
    assert list(said) == ["stage 2, adapters"]
    assert "or cannot be seen to be, this model's in bfloat16: expected" in said["stage 2, adapters"]
