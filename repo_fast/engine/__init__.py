"""The only room that knows DeepSpeed: start, load into shards, forward, backward, step, gather, save, resume.

A model under training, or a frozen one, is an `Engine`. The rest of the trainer calls it like a module and never asks
how its parameters are stored. What is particular here:

- *Micro-batches.* Their number differs from step to step, so the accumulation boundary is set by hand, and losses come
  normalised by the global batch: the only factor left to undo is DeepSpeed's mean over ranks.
- *Non-finite gradients.* DeepSpeed finds them in the global norm, on all ranks alike, skips the step and leaves the
  schedule alone; `step` says so.
- *Generation under ZeRO-3.* The obvious way, `generate` inside `GatheredParameters`, gathers every weight again for
  every token, because the hooks that fetch and release parameters still fire. `gathered` takes them off for the while.
"""

import atexit
import contextlib
import datetime
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from repo_fast.checkpoints.files import writing
from repo_fast.checkpoints.pieces import PieceReader, Pieces
from repo_fast.collectives import TIMEOUT_SECONDS, Ranks
from repo_fast.config import EngineConfig, OptimizerConfig
from repo_fast.engine import fragments as own
from repo_fast.engine.saved import BUFFER, SCHEDULE, Saved, Unsaved, shard_file
from repo_fast.errors import InputError

# DeepSpeed's default for the buffer in which gradients wait to be reduced. ZeRO-3 allocates it whole, 2 GB of float32,
# however small the model is, so it gets no more than the model has gradients.
REDUCE_BUCKET_ELEMENTS = 500_000_000


# DeepSpeed still calls names that newer torch has renamed; the user can do nothing about it, several lines a step.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
# Its barriers name no device; the current one is the rank's own (`start_distributed`).
warnings.filterwarnings("ignore", r"barrier\(\): using the device under current context", UserWarning)


# What torchrun says to each rank, for a process that was started without it; others read it too. Nothing listens there.
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
_said_here: set[str] = set()
_log = logging.getLogger(__name__)


def _deepspeed() -> Any:
    """The library, which takes seconds to import, and which those who only read models need not have."""
    from repo_fast.engine.library import deepspeed

    return deepspeed


def start_distributed(timeout: float = TIMEOUT_SECONDS) -> Ranks:
    """Open the process group (gloo on CPU, nccl on CUDA) as torchrun's environment says, or one of a single process.

    Args:
        timeout: How long ranks wait for one that does not come (seconds); in a collective of the training itself, no
            longer than DeepSpeed does by itself.
    """
    settings = dict(_ALONE)
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1"):
        # All ranks are on this host. Left alone, gloo listens where the host's name leads, and NCCL's bootstrap on the
        # first interface that is not the loopback.
        settings |= {"GLOO_SOCKET_IFNAME": _loopback(), "NCCL_SOCKET_IFNAME": f"={_loopback()}"}
    settings = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(settings)
    _said_here.update(settings)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = process_group_backend()
    c10d = torch.distributed.distributed_c10d
    # DeepSpeed's own, or DEEPSPEED_TIMEOUT, is the most where all ranks do alike: none waits for what one does alone.
    patience = min(datetime.timedelta(seconds=timeout), _deepspeed().constants.default_pg_timeout)
    # DeepSpeed opens groups of its own without saying how long they wait.
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = patience
    if os.environ["WORLD_SIZE"] == "1" and not torch.distributed.is_initialized():
        # A store of its own: one that MASTER_PORT names would listen on every interface.
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    _deepspeed().init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=patience)
    _pause_at_exit()
    return Ranks.connect(timeout)


@cache
def _loopback() -> str:
    """The name of the interface that this host alone reaches."""
    found = psutil.net_if_addrs().items()
    return next((name for name, own in found if any(address.address == "127.0.0.1" for address in own)), "lo")


@cache
def _pause_at_exit() -> None:
    """Let gloo's threads finish before Python goes.

    A thread may still hold the tensor of a collective that is over for everyone else, and needs the interpreter to let
    it go. An interpreter that is shutting down ends the thread, and with it the process (PyTorch's pull request 179291
    describes this): 2 of 33 runs of two ranks that ended right after a collective were aborted so.
    """
    atexit.register(time.sleep, 0.2)


def stop_distributed() -> None:
    """Close the process group, if it is open, and leave the environment as it was."""
    if torch.distributed.is_initialized():
        # DeepSpeed's own: it also forgets the groups it keeps, so that a process can run again.
        _deepspeed().comm.destroy_process_group()
    # Other libraries take these for a launch by torchrun, and open groups of their own.
    while _said_here:
        os.environ.pop(_said_here.pop(), None)


def process_group_backend() -> str:
    """What ranks speak to each other by: nccl on CUDA, else gloo."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def resolve_dtype(choice: str, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations, from `EngineConfig.dtype`."""
    if choice == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, choice)


def _deepspeed_config(
    config: EngineConfig,
    device: torch.device,
    *,
    frozen: bool,
    gradient_clip: float = 0.0,
    trained: int = REDUCE_BUCKET_ELEMENTS,
) -> dict:
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": device.type == "cuda",
        "reduce_bucket_size": min(REDUCE_BUCKET_ELEMENTS, trained),
    }
    if config.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = config.parameter_persistence_threshold
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_parameters or (frozen and config.offload_frozen):
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": gradient_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": resolve_dtype(config.dtype, device) == torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": math.inf,
    }


@contextlib.contextmanager
def sharded_loading(config: EngineConfig, device: torch.device, *, frozen: bool = False) -> Iterator[None]:
    """While this is open, `from_pretrained` loads straight into ZeRO-3 shards (stage 3; else nothing changes).

    Args:
        config: Stage and offload.
        device: Where models compute.
        frozen: Whether it is for models that are not trained.
    """
    if config.zero_stage != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations import deepspeed as integration

    # transformers holds only a weak reference, so this one must live as long as the loading.
    alive = HfDeepSpeedConfig(_deepspeed_config(config, device, frozen=frozen))
    try:
        yield
    finally:
        integration.unset_hf_deepspeed_config()
        del alive


def learning_rate_factor(schedule: str, warmup: float, steps: int) -> Callable[[int], float]:
    """The factor on the peak learning rate for each optimizer step, from 0.

    Linear warm-up over the first `warmup * steps` steps, of which the first is not 0; then a half cosine or a line down
    to 0 at the end, or constant.
    """
    rising = math.ceil(warmup * steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        done = min(1.0, (step - rising) / max(1, steps - rising))
        if schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1 - done if schedule == "linear" else 1.0

    return factor


@dataclass(frozen=True)
class StepResult:
    """One optimizer step.

    Attributes:
        applied: False where the gradient was not finite and the step was skipped, on all ranks alike.
        gradient_norm: Global L2 norm before clipping; NaN or inf where skipped.
        learning_rate: That the step was taken with.
    """

    applied: bool
    gradient_norm: float
    learning_rate: float


class Engine:
    """A model under DeepSpeed, called like the model itself.

    Args:
        module: The model; under ZeRO-3 its parameters may be shards already.
        config: Stage, offload, dtype.
        ranks: This process among all.
        optimizer: Settings for training it; None for a frozen model.
        steps: Optimizer steps of the whole run, for the schedule.
    """

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        ranks: Ranks,
        optimizer: OptimizerConfig | None = None,
        steps: int = 1,
    ) -> None:
        self.module = module
        self._stage = config.zero_stage
        self._ranks = ranks
        self._frozen: tuple[str, str] | None = None
        module.train(optimizer is not None)
        if optimizer is None:
            module.requires_grad_(False)
            self._engine = module.to(ranks.device)
            if self._stage == 3:
                settings = _deepspeed_config(config, ranks.device, frozen=True)
                self._engine = _deepspeed().initialize(model=module, config=settings)[0]
            return
        adam = torch.optim.AdamW(
            _decay_groups(module, optimizer.weight_decay),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            # On a CPU too, where it takes a tenth of the time.
            fused=True,
        )
        factor = learning_rate_factor(optimizer.schedule, optimizer.warmup, steps)
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)
        self._engine, self._optimizer, _, self._schedule = _deepspeed().initialize(
            model=module,
            optimizer=adam,
            lr_scheduler=torch.optim.lr_scheduler.LambdaLR(adam, factor),
            config=_deepspeed_config(
                config, ranks.device, frozen=False, gradient_clip=optimizer.gradient_clip, trained=trained
            ),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    @property
    def frozen_module(self) -> nn.Module:
        """What a frozen model is called by: DeepSpeed's wrapper under ZeRO-3, else the module itself."""
        return self._engine

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradients.

        Args:
            loss: Scalar, normalised by the global batch. It must reach the parameters also where it is 0: every rank
                takes part in every gradient reduction.
            last: Whether this is the step's last micro-batch.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._ranks.size, scale_wrt_gas=False)

    def step(self) -> StepResult:
        """Clip, take the optimizer step, move the schedule."""
        learning_rate = self._schedule.get_last_lr()[0]
        self._engine.step()
        return StepResult(self._engine.was_step_applied(), float(self._engine.get_global_grad_norm()), learning_rate)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """The module with whole parameters and no DeepSpeed hooks, for generation: each rank runs on its own.

        The weights are gathered once, on entry, however many tokens are generated. Changes to them are lost.
        """
        if self._stage != 3:
            yield self.module
            return
        offload = self._engine.optimizer.parameter_offload
        parameters = list(self.module.parameters())
        with _deepspeed().zero.GatheredParameters(parameters):
            for parameter in parameters:
                parameter.ds_active_sub_modules.clear()
            for hook in offload.forward_hooks + offload.backward_hooks:
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield self.module
            finally:
                offload._register_deepspeed_module(self.module)

    def weights_one_by_one(self, chosen: Callable[[str], bool] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and whole weight of each parameter, then of each buffer that a model saves. On their device.

        All ranks must go through all of them. A weight under two names, such as that of a tied head, comes twice. Each
        is gathered when its turn comes, and let go of with the next: it must be copied, or kept, before.

        Args:
            chosen: By its name, whether a weight is wanted; others are not gathered. None: all.
        """
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if chosen is None or chosen(name):
                with self._gathering(parameter):
                    yield name, self._plain(name, parameter)
        yield from (buffer for buffer in self._saved_buffers() if chosen is None or chosen(buffer[0]))

    def whole_state(self) -> dict[str, torch.Tensor]:
        """The whole weights on the CPU, by name, on the first rank; empty on the others. All ranks must call it.

        One parameter is gathered at a time, so that no rank's device ever holds a second model.
        """
        state = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            with self._gathering(parameter):
                if self._ranks.is_first:
                    state[name] = self._plain(name, parameter).cpu().clone()
        if self._ranks.is_first:
            state |= {name: buffer.cpu().clone() for name, buffer in self._saved_buffers()}
        return state

    def _gathering(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager:
        if self._stage != 3:
            return contextlib.nullcontext()
        return _deepspeed().zero.GatheredParameters([parameter])

    def _plain(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        """A whole parameter's value: of a layer that holds its weight packed, as numbers."""
        owner, _, leaf = name.rpartition(".")
        layer = self.module.get_submodule(owner)
        packed = leaf == "weight" and hasattr(layer, "unpacked")
        return layer.unpacked(parameter.detach()) if packed else parameter.detach()

    def sample_state(self) -> dict[str, torch.Tensor]:
        """Zeros in place of a few of the smallest weights that `whole_state` gives: to try out what takes it."""
        sizes = {name: torch.Size(_shape(p)) for name, p in self.module.named_parameters()}
        heads = [name for name in sizes if name.startswith("score_head.")]
        dtypes = {name: self.module.get_parameter(name).dtype for name in sizes}
        # Those with adapters come with them or not at all, and packed ones have another shape there.
        plain = [name for name in sizes if name not in heads and "lora_" not in name and ".base_layer." not in name]
        plain = [name for name in plain if dtypes[name].is_floating_point]
        chosen = [*heads, min(plain, key=lambda name: sizes[name].numel())]
        return {name: torch.zeros(sizes[name], dtype=dtypes[name]) for name in chosen}

    def _saved_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Those that a model saves, which are whole in any stage, as its parameters are not."""
        buffers = {name for name, _ in self.module.named_buffers()}
        for name, value in self.module.state_dict().items():
            if name in buffers:
                yield name, value.detach()

    def unsaved(self) -> Unsaved:
        """This rank's part of what all ranks know of model, optimizer and schedule. All ranks must call it.

        Frozen weights are not in it: what they are known by is.
        """
        optimizer, ranks = self._engine.optimizer, self._ranks
        # All alike: a step is taken by all, or skipped by all.
        adam_step = float(own.adam_steps(optimizer)[0])
        mine = list(own.fragments(optimizer, self.module))
        buffers = dict(self._saved_buffers()) if ranks.is_first else {}
        file = shard_file(ranks.rank, ranks.size)
        tensors = {f"{part.name}/{key}": view for part in mine for key, view in part.views.items()}
        tensors |= {f"{name}/{BUFFER}": value for name, value in buffers.items()}
        pieces: dict[str, Pieces] = {}
        for name, shape, *part in ranks.gather_list([(p.name, p.shape, file, p.start, p.count) for p in mine]):
            pieces.setdefault(name, Pieces(shape)).parts.append(tuple(part))
        schedule, (frozen, rounded) = self._schedule.state_dict(), self._frozen_weights()
        saved = Saved(
            adam_step,
            _computes_in(self.module),
            {key: schedule[key] for key in SCHEDULE},
            frozen,
            {name: pieces[name] for name in sorted(pieces)},
            dict.fromkeys(buffers, file),
            rounded,
        )
        return Unsaved(file, tensors, saved if ranks.is_first else None)

    def save(self, folder: Path) -> None:
        """Write model, optimizer and schedule, each rank its own part, into a new folder. All ranks must call it.

        Raises:
            InputError: A file cannot be written.
        """
        unsaved = self.unsaved()
        with self._ranks.together("writing a checkpoint"), writing(f"checkpoint {folder}"):
            unsaved.write(folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on any number of ranks and in any stage. Only right after construction; all ranks.

        Raises:
            InputError: It is of another model, or of adapters on other weights.
        """
        optimizer, frozen = self._engine.optimizer, self._frozen_weights()
        with self._ranks.together("reading a checkpoint"):
            saved = _read_saved(folder, self.module, frozen)
        if self._ranks.is_first and saved.dtype != _computes_in(self.module):
            said = "going on with engine.dtype %s, where checkpoint %s was written with %s"
            _log.warning(said, _computes_in(self.module), folder, saved.dtype)
        own.before_masters_change(optimizer)
        for step in own.adam_steps(optimizer):
            step.fill_(saved.adam_step)
        with self._ranks.together("reading a checkpoint"), PieceReader(folder) as reader:
            for part in own.fragments(optimizer, self.module):
                parts = saved.parameters[part.name].parts
                for key, view in part.views.items():
                    reader.read_into(view, f"{part.name}/{key}", parts, part.start)
            for name, buffer in self._saved_buffers():
                buffer.copy_(reader.tensor(saved.buffers[name], f"{name}/{BUFFER}"))
        own.after_masters_changed(optimizer)
        self._schedule.load_state_dict(saved.schedule | {"lr_lambdas": [None] * len(optimizer.param_groups)})
        # That of this run's schedule, which is another where the run has more steps than it had.
        factors = [factor(self._schedule.last_epoch) for factor in self._schedule.lr_lambdas]
        self._schedule._last_lr = [rate * by for rate, by in zip(self._schedule.base_lrs, factors, strict=True)]
        for group, learning_rate in zip(optimizer.param_groups, self._schedule._last_lr, strict=True):
            group["lr"] = learning_rate

    def _frozen_weights(self) -> tuple[str, str]:
        """What the frozen weights are known by, in any stage and on any number of ranks: as they are, and rounded. All
        ranks must call it.
        """
        if self._frozen is None:
            self._frozen = _frozen_weights(self.module, self._ranks)
        return self._frozen


def read_weights(module: nn.Module, folder: Path, ranks: Ranks) -> None:
    """Give a whole model that has no engine the trained weights of what `Engine.save` wrote, in its own dtype.

    Raises:
        InputError: As `Engine.load`.
    """
    saved = _read_saved(folder, module, _frozen_weights(module, ranks))
    with PieceReader(folder) as reader, torch.no_grad():
        for name, pieces in saved.parameters.items():
            module.get_parameter(name).copy_(reader.whole(f"{name}/{own.WEIGHT}", pieces))
        for name, file in saved.buffers.items():
            module.get_buffer(name).copy_(reader.tensor(file, f"{name}/{BUFFER}"))


def _read_saved(folder: Path, module: nn.Module, frozen: tuple[str, str]) -> Saved:
    """What the first rank wrote, where it is of this model with these frozen weights; else raises `InputError`.

    Where the model computes in another dtype now, frozen weights can be compared as far as bfloat16 tells them apart.
    """
    saved = Saved.read(folder)
    trained = {name: _shape(parameter) for name, parameter in module.named_parameters() if parameter.requires_grad}
    theirs = {name: pieces.shape for name, pieces in saved.parameters.items()}
    for name in sorted(trained.keys() | theirs.keys()):
        if trained.get(name) != theirs.get(name):
            raise InputError(
                f"checkpoint {folder} is of another model: {name} is {_described(theirs.get(name))} there and "
                f"{_described(trained.get(name))} here"
            )
    dtype, (exact, rounded) = _computes_in(module), frozen
    if saved.frozen == exact:
        return saved
    if saved.dtype == dtype:
        raise InputError(
            f"checkpoint {folder} was trained beside frozen weights that are not this model's, expected the same base, "
            "whatever resume_changed_data says"
        )
    if saved.frozen_rounded != rounded:
        raise InputError(
            f"checkpoint {folder} was trained in {saved.dtype} beside frozen weights that are not, or cannot be seen "
            f"to be, this model's in {dtype}: expected the same base, and engine.dtype {saved.dtype}"
        )
    return saved


def _computes_in(module: nn.Module) -> str:
    """The dtype that a trained model computes in, as torch names it."""
    return str(next(p.dtype for p in module.parameters() if p.requires_grad)).removeprefix("torch.")


def _frozen_weights(module: nn.Module, ranks: Ranks) -> tuple[str, str]:
    # The scales of weights in 4 bits are whole on every rank.
    scales = {name: value for name, value in module.state_dict().items() if name.endswith("_extra_state")}
    digests = []
    for rounded in (False, True):
        sums: dict[str, int] = {}
        for name, part in ranks.gather_list([*own.frozen_sums(module, ranks.rank, rounded=rounded).items()]):
            sums[name] = (sums.get(name, 0) + part) % 2**64
        digests.append(own.digest(sums, scales))
    exact, rounded_too = digests
    return exact, rounded_too


def _shape(parameter: nn.Parameter) -> list[int]:
    return list(getattr(parameter, "ds_shape", parameter.shape))


def _described(shape: list[int] | None) -> str:
    return "not trained" if shape is None else f"{shape}"


def _decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Biases and norms, which have one dimension, are not decayed."""
    decayed, exempt = [], []
    for parameter in module.parameters():
        if parameter.requires_grad:
            dimensions = len(_shape(parameter))
            (decayed if dimensions > 1 else exempt).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@contextlib.contextmanager
def whole_parameters(parameters: Sequence[nn.Parameter], *, changed: bool = False) -> Iterator[None]:
    """While this is open, those that are ZeRO-3 shards are whole, on every rank; for models that have no engine yet.

    All ranks must open it.

    Args:
        parameters: Shards, or whole ones.
        changed: Whether the first rank's changes to them are kept; else changes to shards are lost.
    """
    shards = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not shards:
        yield
        return
    with _deepspeed().zero.GatheredParameters(shards, modifier_rank=0 if changed else None):
        yield
