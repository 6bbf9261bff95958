"""Runs the decoder layers: one function of (stored weights, adapter, hidden states), called for each layer in turn.

`ExecutedLayer` stands in transformers' own module list, so transformers' own `forward` drives the walk and every
architecture keeps its masks, rotary embeddings and scalings. For each layer the policy says what becomes of its
activations:

    keep       autograd keeps them. If the layer is streamed, saved tensors that lie in its slot are kept as addresses
               and looked up again in backward, when the slot holds the layer anew.
    host       as keep, in host memory meanwhile (model/stream/host_activations.py).
    recompute  only the layer's input is saved; backward runs the layer again under autograd.
    offload    as recompute, with the input in host memory meanwhile.

Recomputation leaves out what backward does not need of it (model/support/unused_products.py). It sees the same numbers
because nothing in a layer draws from an RNG: dropout is a function of the token (model/layer/dropout.py), and the
modules stay in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from drawplate.model.layer.adapter import Adapter
from drawplate.model.layer.dropout import module_keys
from drawplate.model.layer.frozen_linear import WHOLE, FrozenLinear
from drawplate.model.layer.functions import Tensors, compiled_functions, functions, without_unused
from drawplate.model.stream.host_activations import HostActivations, SentTensor
from drawplate.model.stream.layer_inputs import InputStore
from drawplate.model.stream.weight_ring import Residency

POLICIES = ("keep", "host", "recompute", "offload")
AGAIN = ("recompute", "offload")
"""Those that compute a layer a second time."""
CACHES = ("past_key_values", "cache_params")
"""What a layer's argument for a cache of earlier tokens is called: in most families, and in Mamba 2."""


@dataclass
class LayerCall:
    """One call of one layer: everything but the hidden states and the weights."""

    layer: int
    adapter_names: tuple[str, ...]
    keys: Tensors
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class LayerRunner:
    """Calls layers with weights from the residency and adapters from the adapter.

    Args:
        templates: the decoder layers on the meta device, linear layers already FrozenLinear.
        residency: gives the stored tensors.
        adapter: gives the trained tensors.
        policies: keep, host, recompute or offload for each layer.
        compiled: compile the layer function; layers of one kind share one compilation.
        whole_dtype: dequantize a quantized layer into this dtype at once, before its function is called, instead of
            weight by weight inside it; layers whose activations are kept are left as they are, because autograd would
            keep the dequantized weights too.
    """

    def __init__(
        self,
        templates: Sequence[nn.Module],
        residency: Residency,
        adapter: Adapter,
        policies: Sequence[str],
        *,
        compiled: bool = False,
        whole_dtype: torch.dtype | None = None,
    ) -> None:
        self.templates, self.residency, self.adapter = list(templates), residency, adapter
        self.policies: tuple[str, ...] = ()
        self.set_policies(policies)
        self.inputs = InputStore(residency.device)
        self.activations = HostActivations(residency.device, poison=residency.poison)
        self._held_for_backward: int | None = None
        self._key_names = [_key_names(template) for template in templates]
        self._salts = _module_salts([len(names) for names in self._key_names], residency.device)
        self._keys: list[Tensor] = []
        self._no_key = torch.empty(0, dtype=torch.int32, device=residency.device)
        self._no_whole = torch.empty(0, device=residency.device)  # of one dtype, or it would be compiled twice
        self._whole_dtype = whole_dtype
        self._quantized = [_quantized_linears(template) for template in templates]
        made = compiled_functions if compiled else functions
        self._functions, self._eager = made(self.templates), functions(self.templates)
        less = [without_unused(template) for template in self.templates]
        self._again = self._functions if less == self.templates else made(less)

    def set_policies(self, policies: Sequence[str]) -> None:
        """What becomes of each layer's activations from the next micro-batch on.

        Raises:
            ValueError: one that does not exist, or not one for each layer.
        """
        if set(policies) - set(POLICIES) or len(policies) != len(self.templates):
            raise ValueError(
                f"policies must be {POLICIES}, one for each of {len(self.templates)} layers; got {policies}"
            )
        self.policies = tuple(policies)

    @contextmanager
    def uncompiled(self, policy: str = "") -> Iterator[None]:
        """Within, layers run as transformers wrote them; with `policy` that becomes of every layer's activations."""
        kept, policies = (self._functions, self._again), self.policies
        again = functions([without_unused(template) for template in self.templates])
        self._functions, self._again = self._eager, again
        self.set_policies([policy or one for one in policies])
        try:
            yield
        finally:
            (self._functions, self._again), self.policies = kept, policies

    def begin(self, token_keys_BT: Tensor | None) -> None:
        """A new micro-batch; keys switch dropout on for it."""
        # All layers' at once: a dozen small operations instead of a dozen a layer.
        self._keys = [] if token_keys_BT is None else list(module_keys(token_keys_BT, self._salts).unbind(0))
        self.let_go()
        self.adapter.begin()
        self.residency.release_all()
        self.inputs.forget()
        self.activations.begin(self.policies)

    def run(self, layer: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The layer's output; differentiable in `hidden` and the adapter."""
        trained = self.adapter.of_layer(layer)
        call = LayerCall(layer, tuple(trained), self._dropout_keys(layer), args, kwargs)
        if not torch.is_grad_enabled():
            weights = self.residency.acquire(layer)
            out = self.compute(call, weights, trained, hidden)
            self.residency.release(layer)
            return out
        if self.policies[layer] in AGAIN:
            out = _RecomputedLayer.apply(self, call, hidden, *trained.values())
        elif self.policies[layer] == "host" or self.residency.streamed[layer]:
            out = self._run_with_moved_tensors(call, trained, hidden)
        else:
            out = self.compute(call, self.residency.acquire(layer), trained, hidden)
        self.activations.end_forward(layer)
        moves = self.residency.streamed[layer] or self.activations.used or self._follows_offloaded(layer)
        return _BeginBackward.apply(out, self, layer) if moves and self.policies[layer] not in AGAIN else out

    def _follows_offloaded(self, layer: int) -> bool:
        return layer > 0 and self.policies[layer - 1] == "offload"

    def _run_with_moved_tensors(self, call: LayerCall, trained: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """What the layer saves of its slot is remembered by address; of the rest, its policy decides."""
        layer, streamed = call.layer, self.residency.streamed[call.layer]
        weights = self.residency.acquire(layer, training=True)
        start, end = 0, 0
        if streamed:
            buffer = self.residency.held_buffer(layer)
            start, end = buffer.data_ptr(), buffer.data_ptr() + buffer.numel()
        given = [x for x in tree_leaves((weights, trained, call.keys, call.args, call.kwargs)) if isinstance(x, Tensor)]
        sends = self.policies[layer] == "host"
        send = self.activations.packing(layer, given) if sends else None

        def pack(tensor: Tensor) -> Tensor | SentTensor | tuple[int, torch.Size, tuple[int, ...], torch.dtype]:
            if start <= tensor.data_ptr() < end and tensor.numel():
                return (tensor.data_ptr() - start, tensor.shape, tensor.stride(), tensor.dtype)
            return send(tensor) if send else tensor

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            if isinstance(packed, SentTensor):
                return self.activations.take(packed)
            offset, shape, stride, dtype = packed
            flat = self.residency.held_buffer(layer)[offset:]
            flat = flat[: flat.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
            return flat.as_strided(shape, stride)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            out = self.compute(call, weights, trained, hidden)
        self.residency.release(layer)
        if sends:
            self.activations.send(layer)
        return out

    def compute(
        self, call: LayerCall, weights: Tensors, trained: Mapping[str, Tensor], hidden: Tensor, *, again: bool = False
    ) -> Tensor:
        """The layer's function, compiled unless a key-value cache is passed along.

        With `again` only its backward is right: the output lacks the products which that does not need."""
        cached = any(call.kwargs.get(name) is not None for name in CACHES)
        function = (self._again if again else self._eager if cached else self._functions)[call.layer]
        tensors = {**weights, **self._whole_weights(call.layer, weights), **trained, **call.keys}
        out = function(tensors, hidden, call.args, call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _whole_weights(self, layer: int, weights: Tensors) -> Tensors:
        linears = self._quantized[layer]
        kept = torch.is_grad_enabled() and self.policies[layer] not in AGAIN
        if self._whole_dtype is None or kept:
            return {f"{path}.{WHOLE}": self._no_whole for path in linears}
        return {
            f"{path}.{WHOLE}": linear.dequantized(weights, path, self._whole_dtype) for path, linear in linears.items()
        }

    def _dropout_keys(self, layer: int) -> Tensors:
        names = self._key_names[layer]
        if not self._keys:
            return dict.fromkeys(names, self._no_key)
        first = sum(len(earlier) for earlier in self._key_names[:layer])
        return dict(zip(names, self._keys[first : first + len(names)], strict=True))

    def begin_backward(self, layer: int) -> None:
        """Backward comes to a layer whose activations were kept."""
        self.let_go()
        if self.residency.streamed[layer]:
            self.residency.acquire(layer, backward=True)
            self._held_for_backward = layer
        if self._follows_offloaded(layer):
            self.inputs.expect()
        self.activations.begin_backward(layer)

    def settle(self) -> None:
        """A micro-step is over: let the current stream wait for all copies, and nothing later for what was before."""
        self.let_go()
        self.residency.settle()
        self.inputs.settle()
        self.activations.settle()

    def let_go(self) -> None:
        """The streamed layer that backward had brought back is done with."""
        if self._held_for_backward is not None:
            self.residency.release(self._held_for_backward)
            self._held_for_backward = None


class _BeginBackward(torch.autograd.Function):
    """Identity on a layer's output whose backward, the first to run of that layer's, brings back what it needs."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, runner: LayerRunner, layer: int) -> Tensor:
        ctx.runner, ctx.layer = runner, layer
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.runner.begin_backward(ctx.layer)
        return grad, None, None


class _RecomputedLayer(torch.autograd.Function):
    """Saves the layer's input; backward computes the layer again and differentiates it on the spot."""

    @staticmethod
    def forward(ctx: Any, runner: LayerRunner, call: LayerCall, hidden: Tensor, *trained: Tensor) -> Tensor:
        layer = call.layer
        ctx.runner, ctx.call = runner, call
        ctx.saved_input = runner.inputs.put(hidden, offload=runner.policies[layer] == "offload")
        weights = runner.residency.acquire(layer, training=True)
        adapter = {name: t.detach() for name, t in zip(call.adapter_names, trained, strict=True)}
        out = runner.compute(call, weights, adapter, hidden.detach())
        runner.residency.release(layer)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        runner, call = ctx.runner, ctx.call
        runner.let_go()
        weights = runner.residency.acquire(call.layer, backward=True)  # the ring's next copy is needed sooner
        runner.activations.begin_backward(call.layer)
        with torch.enable_grad():
            # The first layer's input needs no gradient; asking all the same keeps it the same compiled function.
            hidden = runner.inputs.take(ctx.saved_input).detach().requires_grad_()
            trained = [t.detach().requires_grad_() for t in runner.adapter.of_layer(call.layer).values()]
            adapter = dict(zip(call.adapter_names, trained, strict=True))
            end = get_gradient_edge(runner.compute(call, weights, adapter, hidden, again=True))
            grad_hidden, *gradients = torch.autograd.grad(end, [hidden, *trained], grad_out, allow_unused=True)
        runner.residency.release(call.layer)
        # torch 2.11's compiler keeps what it traced in here, and with it this node: the model must not hang on it.
        ctx.runner = ctx.call = ctx.saved_input = None
        return None, None, grad_hidden if ctx.needs_input_grad[2] else None, *gradients


class ExecutedLayer(nn.Module):
    """Takes a decoder layer's place in transformers' module list and hands the call to the runner.

    Args:
        runner: computes the layer.
        layer: which.
        extras: None where the layer returns a bare tensor; else how many values, None each, its body expects after it.
    """

    def __init__(self, runner: LayerRunner, layer: int, extras: int | None = None) -> None:
        super().__init__()
        self.extras = extras
        object.__setattr__(self, "_runner", runner)
        object.__setattr__(self, "_layer", layer)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        """hidden_states (B, T, H) -> (B, T, H)."""
        out = self._runner.run(self._layer, hidden_states, args, kwargs)
        return out if self.extras is None else (out, *[None] * self.extras)

    def __getattr__(self, name: str) -> Any:
        # Bodies ask their layers for facts such as `attention_type`.
        return getattr(self._runner.templates[self._layer], name)


def _quantized_linears(template: nn.Module) -> dict[str, FrozenLinear]:
    modules = template.named_modules()
    return {path: m for path, m in modules if isinstance(m, FrozenLinear) and not m.storage.native}


def _key_names(template: nn.Module) -> tuple[str, ...]:
    """The dropout keys that a layer's function takes, by name."""
    return tuple(
        f"{path}.dropout_key" for path, m in template.named_modules() if isinstance(m, FrozenLinear) and m.rank
    )


def _module_salts(modules: Sequence[int], device: torch.device) -> Tensor:
    """One for each adapted module of each layer, in order."""
    salts = [(layer + 1) * 1_000_003 + 7919 * i for layer, count in enumerate(modules) for i in range(count)]
    return torch.tensor(salts, dtype=torch.int32, device=device)
