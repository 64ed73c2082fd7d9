"""Distributed training: device setup, synchronized batch norms and gradient averaging.

Lightning Fabric starts the processes and sets precision and device. DistributedDataParallel is not used for gradients
because it expects every parameter in every step, and the min-max game trains only some of them. Gradients are averaged
once per step instead, after the last accumulated pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cclip_deploy.errors import EnvironmentIssue
from cclip_deploy.train.config import Devices

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def launch(devices: Devices) -> Fabric:
    """Start the processes of a recipe on its devices; raise EnvironmentIssue if this machine lacks them."""
    try:
        from lightning.fabric import Fabric
        from lightning.fabric.utilities.exceptions import MisconfigurationException
    except ImportError as error:
        raise EnvironmentIssue("Training needs Lightning. Install it: pip install 'cclip-deploy[train]'") from error
    on_gpu = devices.accelerator != "cpu" and torch.cuda.is_available()
    if devices.accelerator == "cuda" and not on_gpu:
        raise EnvironmentIssue("The recipe requires CUDA, but PyTorch finds no GPU. Set devices.accelerator = 'cpu'.")
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


def move_to_device(model: nn.Module, fabric: Fabric, precision: str) -> None:
    """Move a network to the training device in place; with several processes, synchronize its batch norms."""
    model.to(device=fabric.device, dtype=torch.float64 if precision == "64-true" else torch.float32)
    if fabric.world_size > 1:
        sync_batch_norms(model)


def sync_batch_norms(model: nn.Module) -> None:
    """Synchronize batch norms over all processes: torch's SyncBatchNorm on GPUs, `SyncBatchNorm2d` on the CPU."""
    if any(parameter.is_cuda for parameter in model.parameters()):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the equally large batches of all processes, on any device that supports all-reduce."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        world = torch.distributed.get_world_size()
        mean = _AllReduceSum.apply(x.mean(dim=(0, 2, 3))) / world  # (C,)
        centered = x - mean[:, None, None]
        variance = _AllReduceSum.apply(centered.square().mean(dim=(0, 2, 3))) / world
        if self.track_running_stats:
            self._update_running_stats(mean.detach(), variance.detach(), world * x.numel() // x.shape[1])
        scale = self.weight * (variance + self.eps).rsqrt()
        normalized: Tensor = centered * scale[:, None, None] + self.bias[:, None, None]
        return normalized

    def _update_running_stats(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = float(self.momentum or 0.0)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), momentum)


def average_gradients(fabric: Fabric, parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes, with one all-reduce."""
    if fabric.world_size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat: Tensor = fabric.all_reduce(torch.cat([g.flatten() for g in gradients]), reduce_op="mean")
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def mean_over_processes(fabric: Fabric, values: Tensor) -> Tensor:
    """Average numbers over all processes, so that every process takes the same decision."""
    if fabric.world_size == 1:
        return values
    mean: Tensor = fabric.all_reduce(values.clone(), reduce_op="mean")
    return mean


class _AllReduceSum(torch.autograd.Function):
    """All-reduce sum whose gradient is the sum of all processes' gradients."""

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
