"""Several processes that train as one: batch norms over the whole batch, gradients averaged, one answer to all.

Lightning Fabric starts the processes and sets precision and device. Its gradient averaging (DistributedDataParallel)
expects every parameter to take part in every step, which the min-max game breaks on purpose; here gradients are
averaged once a step, after the last of its passes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cclip_deploy.errors import EnvironmentIssue
from cclip_deploy.train.batches import Share
from cclip_deploy.train.config import Devices

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def launch(devices: Devices) -> Fabric:
    """The processes and devices of a recipe; EnvironmentIssue if this machine has not got them."""
    try:
        from lightning.fabric import Fabric
        from lightning.fabric.utilities.exceptions import MisconfigurationException
    except ImportError as error:
        raise EnvironmentIssue("Training needs Lightning. Install it: pip install 'cclip-deploy[train]'") from error
    on_gpu = devices.accelerator != "cpu" and torch.cuda.is_available()
    if devices.accelerator == "cuda" and not on_gpu:
        raise EnvironmentIssue("The recipe asks for CUDA and PyTorch finds no GPU. Set devices.accelerator = 'cpu'.")
    if devices.precision == "16-mixed" and not on_gpu:
        raise EnvironmentIssue("Mixed precision in float16 needs a GPU. Set devices.precision = 'bf16-mixed'.")
    try:
        fabric = Fabric(
            accelerator=devices.accelerator, devices=devices.count, num_nodes=devices.nodes,
            strategy=devices.strategy, precision=devices.precision,
        )  # fmt: skip
    except (MisconfigurationException, ValueError) as error:
        raise EnvironmentIssue(f"Lightning Fabric cannot use devices = {devices}: {error}") from error
    fabric.launch()
    return fabric


def share_of(fabric: Fabric) -> Share:
    """Which process of how many this one is."""
    return Share(fabric.global_rank, fabric.world_size)


def move_to_device(model: nn.Module, fabric: Fabric, precision: str) -> None:
    """Put a network where it trains, its batch norms joined over all processes, in place."""
    model.to(device=fabric.device, dtype=torch.float64 if precision == "64-true" else torch.float32)
    if fabric.world_size > 1:
        join_batch_norms(model)


def join_batch_norms(model: nn.Module) -> None:
    """Batch norms that see the batch of every process: PyTorch's own on GPUs, where alone it runs, else ours."""
    if any(parameter.is_cuda for parameter in model.parameters()):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = JoinedBatchNorm2d


class JoinedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm over equal batches of all processes, on any device that can all-reduce."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        world = torch.distributed.get_world_size()
        mean = _SumOverProcesses.apply(x.mean(dim=(0, 2, 3))) / world  # (C,)
        centered = x - mean[:, None, None]
        variance = _SumOverProcesses.apply(centered.square().mean(dim=(0, 2, 3))) / world
        if self.track_running_stats:
            self._follow(mean.detach(), variance.detach(), world * x.numel() // x.shape[1])
        scale = self.weight * (variance + self.eps).rsqrt()
        normalized: Tensor = centered * scale[:, None, None] + self.bias[:, None, None]
        return normalized

    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = float(self.momentum or 0.0)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), momentum)


def average_gradients(fabric: Fabric, parameters: Iterable[nn.Parameter]) -> None:
    """Every gradient becomes its mean over all processes, in one message."""
    if fabric.world_size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat: Tensor = fabric.all_reduce(torch.cat([g.flatten() for g in gradients]), reduce_op="mean")
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def mean_over_processes(fabric: Fabric, values: Tensor) -> Tensor:
    """The same numbers in every process, so that all decide alike."""
    if fabric.world_size == 1:
        return values
    mean: Tensor = fabric.all_reduce(values.clone(), reduce_op="mean")
    return mean


class _SumOverProcesses(torch.autograd.Function):
    """A sum over processes whose gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total
