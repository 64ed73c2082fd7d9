"""Base class of the exact rewrites."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import nn

from cclip_deploy.errors import RewriteRefused

Matched = TypeVar("Matched", bound=nn.Module)


class Rewrite(Generic[Matched]):
    """Replace one kind of module by another that computes the same values.

    Subclasses implement `refusal` and `replacement`.
    """

    def refusal(self, module: Matched) -> str | None:
        """Return why the rewrite would not be exact for this module, or None if it is exact."""
        raise NotImplementedError

    def replacement(self, module: Matched) -> nn.Module:
        """Return the replacing module; called only if `refusal` returned None."""
        raise NotImplementedError

    def __call__(self, module: Matched) -> nn.Module:
        """Return the replacing module; raise RewriteRefused with the reason if the rewrite would not be exact."""
        reason = self.refusal(module)
        if reason is not None:
            raise RewriteRefused(f"{type(self).__name__} cannot rewrite {type(module).__name__}: {reason}")
        with torch.no_grad():
            return self.replacement(module).eval()
