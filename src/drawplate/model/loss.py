"""Cross-entropy of a frozen linear head, without ever holding tokens x vocabulary.

One pass over the head gives both the loss and its gradient. It is flash attention with keys = values = the head's
rows: for a tile of the vocabulary, logits; a running maximum and sum per token; and an accumulator of `exp(l - max)
@ W`, shrunk whenever the maximum grows. A head streamed from the host therefore crosses the bus once per micro-batch.
The target's own row t is left out of those sums, because then nothing cancels where the model is already sure:

    gap  = logsumexp(l_j, j != t) - l_t
    loss = softplus(gap)                                                                    (= logsumexp(l) - l_t)
    grad = sigmoid(gap) * (sum_{j != t} softmax_{j != t}(l)_j f'(l_j) W_j  -  f'(l_t) W_t)     (sigmoid(gap) = 1 - p_t)

where f is the soft cap and f' its slope. The gradient is made in the forward, while the logits are at hand, and kept in
the hidden state's dtype; backward only multiplies it by the incoming scalar.

Left out: a head that trains (its gradient would need tokens x vocabulary twice over), label smoothing, z-loss. Products
run in the hidden state's dtype and everything else in float32. There are two products of 2*N*H*V FLOPs, the least
possible. The passes over the logits between them are plain torch: cheap on a CPU, whose cache holds a tile; on a
GPU they cost about as much as the products, which a fused kernel in place of `_add_tile` would mend.

Shapes: N tokens, C tokens that count, B tokens of a tile, H hidden size, V vocabulary (or rows of it).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from drawplate.units import MIB

IGNORED = -100
"""The target of a token that does not count, as everywhere in torch and transformers."""

TILE_TOKENS = {"cpu": 1024, "cuda": 4096}
WORKSPACE_BYTES = {"cpu": 16 * MIB, "cuda": 256 * MIB}
"""A tile of logits should stay in a CPU's last-level cache, where its passes cost little, and keep a GPU busy."""


class HeadRows(Protocol):
    """The head's weight matrix, handed out in runs of rows: all at once, or through a ring of slots."""

    vocab: int
    hidden: int

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield `(first_row, weight_VH)` in order, covering every row once.

        A view is good only until the next one is asked for, by work queued on the current stream.
        """
        ...


class ResidentRows:
    """A head that lives on the device: one tensor, one chunk."""

    def __init__(self, weight_VH: Tensor) -> None:
        self.weight_VH = weight_VH.detach()
        self.vocab, self.hidden = weight_VH.shape

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the whole matrix."""
        yield 0, self.weight_VH


class StreamedRows:
    """A head that lives on the host and passes through two device slots of `slot_rows` rows each.

    The life of one slot; chunk i uses slot i % 2, and the copy of chunk i + 2 is queued when chunk i is done with::

        free --(copy stream: wait for consumed, copy)--> filling --(copied)--> ready
          ^                                                                       |  compute stream waits for copied
          +------(compute stream records consumed)------ in use <----(yield)------+

    On a CPU the same code runs with plain copies and no events. Call `prefetch()` some work ahead of the loss (before
    the last decoder layer, say) to hide the first two copies as well.

    Args:
        host_VH: the rows, page-locked where the device is a GPU (pageable memory works, but copies then block).
        device: where the slots are.
        slot_rows: rows of one slot; the slots take `2 * slot_rows * H` elements.
        poison: fill a slot with NaN as soon as it is free, so that a view used too late is noticed. For tests.
    """

    SLOTS = 2

    def __init__(self, host_VH: Tensor, device: torch.device, *, slot_rows: int, poison: bool = False) -> None:
        self.host_VH = host_VH.detach()
        self.vocab, self.hidden = host_VH.shape
        self.slot_rows = min(slot_rows, self.vocab)
        self.poison = poison
        self._slots = [host_VH.new_empty(self.slot_rows, self.hidden, device=device) for _ in range(self.SLOTS)]
        self._queued = 0  # chunks of the present pass whose copy has been queued
        self._stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
        if self._stream is not None:
            self._copied = [torch.cuda.Event() for _ in self._slots]
            self._consumed = [torch.cuda.Event() for _ in self._slots]
            for event in self._consumed:  # the slots' memory may still be in use by whoever had it before
                event.record(torch.cuda.current_stream(device))

    @property
    def device_bytes(self) -> int:
        """Bytes of the slots."""
        return sum(slot.nbytes for slot in self._slots)

    def prefetch(self) -> None:
        """Queue the copies of the first chunks of the next pass, unless they are queued already."""
        while self._queued < self.SLOTS:
            self._queue_copy()

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield every chunk in order. One pass at a time."""
        self.prefetch()
        try:
            for index, first_row in enumerate(range(0, self.vocab, self.slot_rows)):
                slot = index % self.SLOTS
                if self._stream is not None:
                    torch.cuda.current_stream(self._stream.device).wait_event(self._copied[slot])
                try:
                    yield first_row, self._slots[slot][: self.vocab - first_row]
                finally:
                    self._release(slot)
                self._queue_copy()
        finally:
            self._queued = 0

    def _release(self, slot: int) -> None:
        if self.poison:
            self._slots[slot].fill_(math.nan)
        if self._stream is not None:
            self._consumed[slot].record(torch.cuda.current_stream(self._stream.device))

    def _queue_copy(self) -> None:
        rows_VH = self.host_VH[self._queued * self.slot_rows :][: self.slot_rows]
        slot = self._queued % self.SLOTS
        self._queued += 1
        if self._stream is None:
            self._slots[slot][: len(rows_VH)].copy_(rows_VH)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._consumed[slot])
            self._slots[slot][: len(rows_VH)].copy_(rows_VH, non_blocking=True)
            self._copied[slot].record(self._stream)


@dataclass(frozen=True, kw_only=True)
class Head:
    """A frozen head: `logits = softcap * tanh(z / softcap)`, with `z = logit_scale * (hidden @ weight.T + bias)`.

    Args:
        weights: the weight matrix, resident or streamed.
        bias: (V,), on the device, or None.
        softcap: `final_logit_softcapping` of Gemma 2, or None.
        logit_scale: `logit_scale` of Cohere, `1 / logits_scaling` of Granite.
        workspace_bytes: what a tile of logits may take; None for the device's default.
    """

    weights: HeadRows
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    workspace_bytes: int | None = None

    @property
    def vocab(self) -> int:
        """Rows of the head."""
        return self.weights.vocab

    def finish(self, logits_NV: Tensor, bias_V: Tensor | None) -> Tensor:
        """Bias, scale and soft cap, in place, on what the product gave."""
        if bias_V is not None:
            logits_NV.add_(bias_V)
        if self.logit_scale != 1.0:
            logits_NV.mul_(self.logit_scale)
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV


def head_cross_entropy(
    hidden_NH: Tensor,
    head: Head,
    targets_N: Tensor,
    *,
    scale: float | Tensor = 1.0,
    counted: int | None = None,
    impl: Literal["chunked", "reference"] = "chunked",
) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy of the tokens that count, and each token's own.

    Args:
        hidden_NH: what the head is applied to, already shifted against the targets; gradients flow here and nowhere
            else. Without autograd (evaluation) no gradient is made and less memory is used.
        head: the frozen head.
        targets_N: int64 ids; `IGNORED` (-100) for tokens that do not count.
        scale: factor on the returned loss, and on the gradient before it is rounded to the hidden state's dtype. Pass
            `loss scale / tokens of the step` here rather than multiply later: fp16 gradients then do not underflow.
        counted: how many targets are not `IGNORED`. With it nothing waits for a GPU; without it they are counted,
            which on a GPU is a synchronisation. A wrong number gives NaN, not a wrong loss.
        impl: "reference" holds all logits and uses autograd: the specification.

    Returns:
        `(loss, nats_N)`: the scalar `scale * nats.sum()` in float32 (float64 for float64 input), differentiable; and
        the unscaled nats per token, detached, 0 where the target is `IGNORED`.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if hidden_NH.dim() != 2 or targets_N.shape != hidden_NH.shape[:1] or hidden_NH.shape[1] != head.weights.hidden:
        raise ValueError(
            f"hidden {tuple(hidden_NH.shape)} and targets {tuple(targets_N.shape)} must be (N, {head.weights.hidden}) "
            "and (N,): flatten batch and time first"
        )
    if impl == "reference":
        return _reference(hidden_NH, head, targets_N, scale)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        if torch.is_grad_enabled() and hidden_NH.requires_grad:
            result: tuple[Tensor, Tensor] = _HeadCrossEntropy.apply(hidden_NH, head, targets_N, scale, counted)
            return result
        _, nats_C, counted_N = _compact_pass(hidden_NH, head, targets_N, counted, training=False)
        nats_N = nats_C.new_zeros(len(targets_N)).index_copy_(0, counted_N, nats_C)
        return nats_C.sum() * scale, nats_N


def loss_workspace_bytes(
    tokens: int,
    head: Head,
    dtype: torch.dtype,
    device: torch.device,
    *,
    training: bool = True,
    counted: int | None = None,
) -> int:
    """Peak bytes that `head_cross_entropy` allocates while it runs, the head's slots not among them.

    One tile of logits (`B * columns * bytes per element`) and 8 float32 numbers for each token that counts. If some do
    not count, a copy of the hidden states of those that do (C * H elements). In training also their float32
    accumulator and their targets' rows (C * H elements each), and one block's rows and product (3 * B * H elements).
    Afterwards only the gradient stays (C * H elements) until backward, which makes another N * H. Blind to the
    allocator's rounding and to the workspace of cuBLAS and oneDNN.
    """
    counted = tokens if counted is None else counted
    hidden, size = head.weights.hidden, dtype.itemsize
    tile = _Tile.shape(counted, head, dtype, torch.device(device), training)
    total = tile.tokens * tile.columns * tile.element_bytes + counted * 8 * 4
    if counted < tokens:
        total += counted * hidden * size
    if training:
        total += counted * hidden * (tile.sum_dtype.itemsize + size) + 3 * tile.tokens * hidden * size
    return total


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, head: Head, targets_N: Tensor, scale: float | Tensor, counted: int | None
    ) -> tuple[Tensor, Tensor]:
        grad_CH, nats_C, counted_N = _compact_pass(hidden_NH, head, targets_N, counted, training=True)
        assert grad_CH is not None
        ctx.save_for_backward(grad_CH.mul_(scale).to(hidden_NH.dtype), counted_N)
        ctx.tokens = len(targets_N)
        nats_N = nats_C.new_zeros(ctx.tokens).index_copy_(0, counted_N, nats_C)
        ctx.mark_non_differentiable(nats_N)
        return nats_C.sum() * scale, nats_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_nats: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        grad_CH, counted_N = ctx.saved_tensors
        grad_CH = grad_CH * grad_loss.to(grad_CH.dtype)
        if len(grad_CH) == ctx.tokens:  # counted_N keeps the order, so these are the tokens themselves
            return grad_CH, None, None, None, None
        grad_NH = grad_CH.new_zeros(ctx.tokens, grad_CH.shape[1])
        return grad_NH.index_copy_(0, counted_N, grad_CH), None, None, None, None


def _compact_pass(
    hidden_NH: Tensor, head: Head, targets_N: Tensor, counted: int | None, *, training: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Leave out the ignored tokens, run the pass -> (gradient_CH, nats_C, indices of the tokens that count)."""
    ignored_N = targets_N == IGNORED
    present = ignored_N.logical_not().sum()
    if counted is None:
        counted = int(present)
    # A stable sort, not nonzero(): its output's size is known without asking the device.
    counted_N = torch.argsort(ignored_N, stable=True)[:counted].to(hidden_NH.device, non_blocking=True)
    if counted < len(targets_N):
        hidden_NH = hidden_NH.index_select(0, counted_N)
    targets_C = targets_N.to(hidden_NH.device, non_blocking=True).index_select(0, counted_N)
    grad_CH, nats_C = _one_pass(hidden_NH.detach(), head, targets_C, training)
    right = (present == counted).to(nats_C.device, non_blocking=True)
    return grad_CH, torch.where(right, nats_C, math.nan), counted_N


def _one_pass(hidden_CH: Tensor, head: Head, targets_C: Tensor, training: bool) -> tuple[Tensor | None, Tensor]:
    """The pass over the head -> (gradient_CH in the sums' dtype, before `scale`; nats_C)."""
    sums = _Sums.start(hidden_CH, targets_C, training)
    tile = _Tile.shape(len(targets_C), head, hidden_CH.dtype, hidden_CH.device, training)
    tile.allocate(head.weights.hidden)
    blocks = [sums[start : start + tile.tokens] for start in range(0, len(targets_C), tile.tokens)]
    for first_row, weight_VH in head.weights.chunks() if blocks else ():
        if training:
            for block in blocks:
                block.keep_target_rows(first_row, weight_VH)
        for start in range(0, len(weight_VH), tile.columns):
            rows_VH = weight_VH[start : start + tile.columns].to(tile.product_dtype)
            for block in blocks:
                _add_tile(block, tile, head, first_row + start, rows_VH)
    return sums.finish(head)


def _add_tile(block: _Sums, tile: _Tile, head: Head, first_row: int, rows_VH: Tensor) -> None:
    """Add the vocabulary rows `first_row ...` to the running sums of the tokens of one block."""
    logits_BV = tile.logits(block.hidden_BH, rows_VH)
    head.finish(logits_BV, None if head.bias is None else head.bias[first_row : first_row + len(rows_VH)])

    inside_B, column_B = block.targets_within(first_row, len(rows_VH))
    own_B1 = logits_BV.gather(1, column_B[:, None])
    torch.where(inside_B, own_B1[:, 0], block.target_logit_B, out=block.target_logit_B)
    logits_BV.scatter_(1, column_B[:, None], own_B1.masked_fill_(inside_B[:, None], -math.inf))

    max_B = torch.maximum(block.max_B, logits_BV.amax(1))
    shrink_B = torch.exp(block.max_B - max_B)
    slope_BV = tile.slope(logits_BV, head.softcap) if block.gradient_BH is not None else None
    logits_BV.sub_(max_B[:, None]).exp_()
    block.sum_B.mul_(shrink_B).add_(logits_BV.sum(1))
    block.max_B.copy_(max_B)
    if block.gradient_BH is not None:
        block.gradient_BH.mul_(shrink_B[:, None])
        tile.accumulate(block.gradient_BH, logits_BV if slope_BV is None else logits_BV.mul_(slope_BV), rows_VH)


@dataclass
class _Sums:
    """What is known of each token after the vocabulary rows seen so far, the target's own row left out."""

    hidden_BH: Tensor
    targets_B: Tensor
    max_B: Tensor  # of the logits; the lowest finite number at first, so that no difference is NaN
    sum_B: Tensor  # of exp(logit - max)
    target_logit_B: Tensor  # NaN until its row has passed, so that an id outside the vocabulary is not silent
    gradient_BH: Tensor | None  # sum of exp(logit - max) * slope * row
    target_row_BH: Tensor | None

    @classmethod
    def start(cls, hidden_BH: Tensor, targets_B: Tensor, training: bool) -> _Sums:
        dtype = _sum_dtype(hidden_BH.dtype)
        zeros_B = hidden_BH.new_zeros(len(targets_B), dtype=dtype)
        return cls(
            hidden_BH=hidden_BH,
            targets_B=targets_B,
            max_B=torch.full_like(zeros_B, torch.finfo(dtype).min),
            sum_B=zeros_B,
            target_logit_B=torch.full_like(zeros_B, math.nan),
            gradient_BH=torch.zeros_like(hidden_BH, dtype=dtype) if training else None,
            target_row_BH=torch.zeros_like(hidden_BH) if training else None,
        )

    def __getitem__(self, tokens: slice) -> _Sums:
        """The same tensors, seen through a block of tokens."""
        values: dict[str, Any] = {name: None if value is None else value[tokens] for name, value in vars(self).items()}
        return _Sums(**values)

    def targets_within(self, first_row: int, rows: int) -> tuple[Tensor, Tensor]:
        """-> (is the target among these rows, its place among them or any valid place)."""
        column_B = self.targets_B - first_row
        return (column_B >= 0) & (column_B < rows), column_B.clamp(0, rows - 1)

    def keep_target_rows(self, first_row: int, weight_VH: Tensor) -> None:
        """Copy the targets' rows of this chunk: a gather, so that nothing has to be known on the host."""
        assert self.target_row_BH is not None
        inside_B, column_B = self.targets_within(first_row, len(weight_VH))
        rows_BH = weight_VH.index_select(0, column_B).to(self.target_row_BH.dtype)
        torch.where(inside_B[:, None], rows_BH, self.target_row_BH, out=self.target_row_BH)

    def finish(self, head: Head) -> tuple[Tensor | None, Tensor]:
        """-> (gradient, nats), by the formulas at the top of the file."""
        gap_B = self.max_B + self.sum_B.log() - self.target_logit_B
        if self.gradient_BH is None or self.target_row_BH is None:
            return None, F.softplus(gap_B)
        slope_B = torch.ones_like(gap_B)
        if head.softcap is not None:
            slope_B -= (self.target_logit_B / head.softcap).square_()
        total_B = self.sum_B.clamp_min_(torch.finfo(self.sum_B.dtype).tiny)  # a vocabulary of one row has no rest
        grad_BH = self.gradient_BH.div_(total_B[:, None])
        grad_BH.addcmul_(self.target_row_BH, slope_B[:, None].to(grad_BH.dtype), value=-1)
        return grad_BH.mul_((gap_B.sigmoid() * head.logit_scale)[:, None]), F.softplus(gap_B)


@dataclass
class _Tile:
    """The buffers for one tile of logits, allocated once a pass, and the two products that use them.

    Three ways to multiply, by what the device offers. Same dtype for products and sums: straight into the buffers. A
    GPU: low-precision products that leave and accumulate float32, no extra pass. A CPU with bfloat16: its products only
    leave bfloat16, so each is followed by a pass that converts (logits) or adds (gradient).
    """

    tokens: int
    columns: int
    product_dtype: torch.dtype
    sum_dtype: torch.dtype
    device: torch.device
    training: bool
    has_slope: bool

    @classmethod
    def shape(cls, tokens: int, head: Head, dtype: torch.dtype, device: torch.device, training: bool) -> _Tile:
        kind = "cpu" if device.type == "cpu" else "cuda"
        blocks = max(1, math.ceil(tokens / TILE_TOKENS[kind]))
        # A CPU multiplies fp16 far more slowly than float32.
        product_dtype = torch.float32 if (kind, dtype) == ("cpu", torch.float16) else dtype
        tile = cls(
            tokens=max(1, math.ceil(tokens / blocks)),
            columns=head.vocab,
            product_dtype=product_dtype,
            sum_dtype=_sum_dtype(dtype),
            device=device,
            training=training,
            has_slope=training and head.softcap is not None,
        )
        budget = head.workspace_bytes or WORKSPACE_BYTES[kind]
        columns = budget // (tile.tokens * tile.element_bytes)
        tile.columns = min(head.vocab, max(256, columns - columns % 256))
        return tile

    @property
    def element_bytes(self) -> int:
        """Bytes for each logit: in the sums' dtype, in the products' if that differs, and for the soft cap's slope."""
        low = self.product_dtype.itemsize if self._mixed else 0
        return self.sum_dtype.itemsize * (2 if self.has_slope else 1) + low

    @property
    def _mixed(self) -> bool:
        return self.product_dtype != self.sum_dtype

    def allocate(self, hidden: int) -> None:
        elements = self.tokens * self.columns
        self._logits = torch.empty(elements, dtype=self.sum_dtype, device=self.device)
        self._low = torch.empty(elements, dtype=self.product_dtype, device=self.device) if self._mixed else self._logits
        self._slope = torch.empty_like(self._logits) if self.has_slope else None
        needs_product = self.training and self._mixed and self.device.type == "cpu"
        shape = (self.tokens, hidden) if needs_product else (0, hidden)
        self._product_BH = torch.empty(shape, dtype=self.product_dtype, device=self.device)

    def logits(self, hidden_BH: Tensor, rows_VH: Tensor) -> Tensor:
        """hidden @ rows.T, in the sums' dtype."""
        shape = (len(hidden_BH), len(rows_VH))
        logits_BV = self._logits[: shape[0] * shape[1]].view(shape)
        hidden_BH = hidden_BH.to(self.product_dtype)
        if not self._mixed:
            return torch.mm(hidden_BH, rows_VH.T, out=logits_BV)
        if self.device.type != "cpu":
            return torch.mm(hidden_BH, rows_VH.T, out_dtype=self.sum_dtype, out=logits_BV)
        low_BV = self._low[: shape[0] * shape[1]].view(shape)
        return logits_BV.copy_(torch.mm(hidden_BH, rows_VH.T, out=low_BV))

    def slope(self, logits_BV: Tensor, softcap: float | None) -> Tensor | None:
        """The soft cap's slope at each logit, `1 - (l / cap)**2`; None without a cap. The target's -inf has slope 0."""
        if softcap is None or self._slope is None:
            return None
        slope_BV = torch.div(logits_BV, softcap, out=self._slope[: logits_BV.numel()].view(logits_BV.shape))
        return slope_BV.clamp_min_(-1.0).square_().neg_().add_(1.0)

    def accumulate(self, gradient_BH: Tensor, weights_BV: Tensor, rows_VH: Tensor) -> None:
        """gradient += weights @ rows, the weights (at most 1) rounded to the products' dtype."""
        if not self._mixed:
            gradient_BH.addmm_(weights_BV, rows_VH)
            return
        low_BV = self._low[: weights_BV.numel()].view(weights_BV.shape).copy_(weights_BV)
        if self.device.type != "cpu":
            torch.addmm(gradient_BH, low_BV, rows_VH, out_dtype=self.sum_dtype, out=gradient_BH)
        else:
            gradient_BH.add_(torch.mm(low_BV, rows_VH, out=self._product_BH[: len(low_BV)]))


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _reference(hidden_NH: Tensor, head: Head, targets_N: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """The specification: all logits at once, autograd's gradient."""
    weight_VH = torch.cat([rows_VH.clone() for _, rows_VH in head.weights.chunks()]).to(hidden_NH.dtype)
    logits_NV = F.linear(hidden_NH, weight_VH).to(_sum_dtype(hidden_NH.dtype))
    if head.bias is not None:
        logits_NV = logits_NV + head.bias
    logits_NV = logits_NV * head.logit_scale
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    nats_N = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="none")
    return nats_N.sum() * scale, nats_N.detach()
