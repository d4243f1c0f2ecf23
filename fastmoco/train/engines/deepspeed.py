"""DeepSpeed: many processes that share out the optimiser's state, the gradients or the weights (ZeRO).

Rajbhandari et al. 2020. Stage 0 shares out nothing, 1 the momentum, 2 the gradients too, 3 the weights as well, the key
encoder's among them. Weights are kept in float32 whatever the precision, and multiplied under autocast.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmoco.distributed.collectives import start_sum
from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from fastmoco.ops.ema import ema_update_
from fastmoco.train.config import OptimConfig
from fastmoco.train.engines.engine import COMPUTE_DTYPE
from fastmoco.train.engines.single import check_fits
from fastmoco.train.objective import Objective

_MOMENTUM = "momentum_buffer"


def require_deepspeed() -> None:
    """Raise UserError, saying what to install, where DeepSpeed is missing."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "--engine deepspeed: DeepSpeed is not installed; DS_BUILD_OPS=0 pip install 'fastmoco[deepspeed]', or "
            "choose --engine ddp"
        )


class DeepSpeed:
    """Runs `module` under ZeRO stage `zero`, 0 to 3; see `Engine`.

    The averages follow the weights where these lie: under stage 3 each process moves its own shards of both, which
    are cut alike, and sends nothing for it. A step reads one flag back to the host, as DeepSpeed's own steps do.
    """

    def __init__(
        self,
        module: Objective,
        optim: OptimConfig,
        *,
        precision: str,
        world: World,
        zero: int,
    ) -> None:
        if world.device.type == "cpu":
            # Else it looks for an accelerator, and warns.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # It insists on this one, which srun does not set.
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
        import deepspeed

        if world.device.type == "cpu":
            # Else it compiles C++ at the first start, for half a minute, to do in shared memory what gloo does.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # It warns of optimisers that it has not tried, of torch's new names and of every step that overflowed.
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
        self.module = module
        self.world = world
        self.device = world.device
        self.precision = precision
        self.zero = zero
        self.name = f"deepspeed, ZeRO {zero}"
        self.blocked = torch.zeros((), device=self.device)
        self.trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._shapes = {name: p.shape for name, p in module.named_parameters()}
        keys = {id(p): name for name, p in module.named_parameters()}
        self._averages = {query: keys[id(average)] for query, average in module.averages.items()}
        for parameter in module.parameters():
            # It lays weights out one after the other, and knows no other order of their elements.
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        # Its step comes with a learning rate each time; DeepSpeed takes its parameters apart and puts shards in.
        self._sgd = torch.optim.SGD(
            list(self.trainable.values()),
            lr=optim.lr,
            momentum=optim.sgd_momentum,
            weight_decay=optim.weight_decay,
        )
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self._sgd,
            model_parameters=list(self.trainable.values()),
            config=_configuration(optim, precision, world, zero),
            dist_init_required=False,
        )
        self._has_momentum = optim.sgd_momentum > 0
        if self._has_momentum:
            self._begin_momentum()

    @property
    def shards_weights(self) -> bool:
        return self.zero == 3

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager[object]:
        self._engine.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def forward(self, *inputs: Tensor | None) -> Any:
        return self._engine(*inputs)

    def backward(self, losses: Iterable[Tensor], *, divisor: int) -> None:
        stacked = torch.stack(list(losses))
        finite = stacked.detach().isfinite().all()
        self.blocked.copy_(torch.maximum(self.blocked, (~finite).to(self.blocked.dtype)))
        # It divides by the micro-batches of a step itself.
        self._engine.backward(stacked.sum() * (self._engine.gradient_accumulation_steps() / divisor))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self, lr: float, *, ema: float) -> None:
        agreeing = start_sum(self.world, self.blocked, kind="control", op=dist.ReduceOp.MAX)
        if agreeing is not None:
            agreeing.wait()
        for group in self._sgd.param_groups:
            group["lr"] = lr
        if self.blocked.item():
            self._engine.zero_grad()
            if self.zero:
                self._engine.optimizer.zero_grad()
        else:
            self._engine.step()
            self._shrink_scale()
        pairs = [(self._local(key), self._local(query)) for query, key in self._averages.items()]
        ema_update_([key for key, _ in pairs], [query for _, query in pairs], ema)

    def _local(self, name: str) -> Tensor:
        """What this process holds of a parameter: all of it, or its shard (n,), padded, under stage 3."""
        parameter = self.module.get_parameter(name)
        held: Tensor = parameter.ds_tensor if self.zero == 3 else parameter  # type: ignore[attr-defined]
        return held.detach()

    @property
    def _scaler(self) -> Any:
        if self.precision != "fp16":
            return None
        if self.zero:
            return self._engine.optimizer.torch_autocast_gradscaler
        return self._engine.torch_autocast_z0_gradscaler

    def _shrink_scale(self) -> None:
        # A ZeRO optimiser leaves out a step that overflowed without a word to the scaler.
        if self._scaler is not None and getattr(self._engine.optimizer, "overflow", False):
            self._scaler.update(self._scaler.get_scale() / 2)

    def keep_gradients(self) -> None:
        raise UserError("DeepSpeed makes and shares out gradients itself")

    def state(self) -> dict[str, Tensor]:
        # One by one to the host: whole, they are more than a device that needs ZeRO has room for.
        tensors = {f"module.{name}": self._full(name) for name in self._shapes}
        if self._has_momentum:
            tensors |= {f"momentum.{name}": self._full_momentum(p) for name, p in self.trainable.items()}
        if self._scaler is not None:
            kept = self._scaler.state_dict()
            for name, value in (("scale", kept["scale"]), ("good", kept["_growth_tracker"])):
                tensors[f"scaler.{name}"] = torch.tensor(float(value))
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        check_fits(self._expected(), tensors)
        for name in self._shapes:
            self._set(name, tensors[f"module.{name}"])
        if self._has_momentum:
            for name, p in self.trainable.items():
                self._set_momentum(p, tensors[f"momentum.{name}"])
        if self._scaler is not None:
            kept = self._scaler.state_dict()
            kept |= {"scale": tensors["scaler.scale"].item(), "_growth_tracker": int(tensors["scaler.good"].item())}
            self._scaler.load_state_dict(kept)

    def _expected(self) -> dict[str, Tensor]:
        """What `state` holds, without its values."""
        shapes = {f"module.{name}": shape for name, shape in self._shapes.items()}
        if self._has_momentum:
            shapes |= {f"momentum.{name}": self._shapes[name] for name in self.trainable}
        if self._scaler is not None:
            shapes |= {"scaler.scale": torch.Size(), "scaler.good": torch.Size()}
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    def _full(self, name: str) -> Tensor:
        parameter = self.module.get_parameter(name)
        if self.zero < 3:
            return parameter.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().to("cpu", copy=True)

    def _set(self, name: str, value: Tensor) -> None:
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_full_fp32_param

        parameter = self.module.get_parameter(name)
        if self.zero < 3:
            parameter.copy_(value)
            if self.zero and parameter.requires_grad:
                safe_set_full_fp32_param(parameter, value.float())
            return
        shard = self._shard(value, parameter)
        self._local(name).copy_(shard)
        if parameter.requires_grad:
            safe_get_local_fp32_param(parameter).copy_(shard)

    def _full_momentum(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self.zero:
            return self._sgd.state[parameter][_MOMENTUM]
        full: Tensor = safe_get_full_optimizer_state(parameter, _MOMENTUM)
        return full.cpu()

    def _set_momentum(self, parameter: nn.Parameter, value: Tensor) -> None:
        from deepspeed.utils import safe_get_local_optimizer_state, safe_set_full_optimizer_state

        if not self.zero:
            self._sgd.state[parameter][_MOMENTUM].copy_(value)
        elif self.zero < 3:
            safe_set_full_optimizer_state(parameter, value.float(), _MOMENTUM)
        else:
            safe_get_local_optimizer_state(parameter, _MOMENTUM).copy_(self._shard(value, parameter))

    def _shard(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """This process's part (n,) of `value` under stage 3, with zeros beyond its end."""
        n = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        flat = value.flatten().to(self.device)
        padded = torch.nn.functional.pad(flat, (0, n * self.world.size - flat.numel()))
        return padded[self.world.rank * n : (self.world.rank + 1) * n]

    def _begin_momentum(self) -> None:
        """Momentum of zeros from the start, which torch's first step makes of it too: a checkpoint may come before."""
        optimizer = self._engine.optimizer
        if self.zero == 3:
            shards = optimizer.fp32_partitioned_groups_flat
        elif self.zero:
            shards = optimizer.single_partition_of_fp32_groups
        else:
            shards = list(self.trainable.values())
        for shard in shards:
            self._sgd.state[shard][_MOMENTUM] = torch.zeros_like(shard)
        if self.zero in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()


def _configuration(optim: OptimConfig, precision: str, world: World, zero: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        # Batches are the loader's affair; this is for reports that are not asked for.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": optim.accumulate,
        "steps_per_print": 2**62,
        # Else it clips them to a norm of 1.
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero,
            # Every weight in shards, BatchNorm's few too, so that all averages move alike.
            "stage3_param_persistence_threshold": 0,
        },
    }
    if precision != "fp32":
        dtype = str(COMPUTE_DTYPE[precision]).removeprefix("torch.")
        settings["torch_autocast"] = {"enabled": True, "dtype": dtype}
    return settings
