"""Matrix products of one forward pass, kept and given to a later one over the same numbers that wants gradients.

    with Keep(module) as kept: answer = module(…)             # a few rows at once, no gradients
    with Give(products): answer = module(…)                    # all rows at once, with gradients; no product is made again

Both passes must call `module`'s linear layers in the same order. Everything else (activations, gates, norms) is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

_linear: Callable[..., Tensor] = nn.functional.linear


class Keep(TorchFunctionMode):
    """`products`: what the linear layers of `module` gave within the block, in their order."""

    def __init__(self, module: nn.Module):
        super().__init__()
        # others' layers pass within the block too, some of them differentiated by torch.func: what they give must not leave it
        self._weights = {id(parameter) for parameter in module.parameters()}
        self.products: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is _linear and id(args[1]) in self._weights:
            self.products.append(result)
        return result


class Give(TorchFunctionMode):
    """Linear layers (rows, inputs) -> (rows, outputs) called within the block give `products` in their order, and are differentiated
    as if they had been computed.

    Raises:
        ValueError: at the block's end, if not all were taken, or at a call for which there is none.
    """

    def __init__(self, products: Sequence[Tensor]):
        super().__init__()
        self._products, self._taken = products, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not _linear:
            return func(*args, **(kwargs or {}))
        if self._taken == len(self._products):
            raise ValueError(f"products: {len(self._products)} were kept, and another layer is called")
        self._taken += 1
        inputs, weight, bias = args
        return _Given.apply(inputs, weight, bias, self._products[self._taken - 1])

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        if exc[0] is None and self._taken < len(self._products):
            raise ValueError(f"products: {len(self._products)} were kept, {self._taken} taken")


class _Given(Function):
    """x Wᵀ + b whose value is known."""

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor, bias: Tensor | None, product: Tensor) -> Tensor:
        return product.view_as(product)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        wanted, (grad,) = ctx.needs_input_grad, grads
        # in the precision of the product: under autocast its factors were rounded to it
        into = (grad @ weight.to(grad.dtype)).to(inputs.dtype) if wanted[0] else None
        turned = (grad.mT @ inputs.to(grad.dtype)).to(weight.dtype) if wanted[1] else None
        return into, turned, grad.sum(0).to(weight.dtype) if wanted[2] else None, None
