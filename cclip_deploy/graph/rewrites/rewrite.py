"""What every exact rewrite has in common."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import nn

from cclip_deploy.errors import RewriteRefused

Matched = TypeVar("Matched", bound=nn.Module)


class Rewrite(Generic[Matched]):
    """Replaces one kind of module by one that computes the same; subclasses say which, when not, and by what."""

    def refusal(self, module: Matched) -> str | None:
        """Why this rewrite would not be exact here, in words; None where it is."""
        raise NotImplementedError

    def replacement(self, module: Matched) -> nn.Module:
        """The module to put there; called only where nothing was refused."""
        raise NotImplementedError

    def __call__(self, module: Matched) -> nn.Module:
        """The replacement; RewriteRefused with the reason where it would not be exact."""
        reason = self.refusal(module)
        if reason is not None:
            raise RewriteRefused(f"{type(self).__name__} cannot rewrite {type(module).__name__}: {reason}")
        with torch.no_grad():
            return self.replacement(module).eval()
