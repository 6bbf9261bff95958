"""The ledger's peaks without its lines: what a search among thousands of choices can afford.

The same sums as planner/bytes/replay.py, taken at the few moments where the peak can be, with like layers counted
instead of walked. The allocator's gaps are estimated: a share of the blocks that come and go.
tests/planner/bytes/test_ledger.py holds it to the ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from drawplate.layout.buffers import RETURN_BUFFERS
from drawplate.layout.footprint import TRIAL, Footprint, Trace
from drawplate.layout.stored_linear import DTYPE_BYTES, PLAIN_DTYPES
from drawplate.planner.bytes.batch_rows import Rows, eval_rows_of, train_rows_of
from drawplate.planner.bytes.host import HostLines, Row, context_lines
from drawplate.planner.bytes.host_kept import leaving, most_back, sent_blocks
from drawplate.planner.bytes.sketch import sketched
from drawplate.planner.bytes.stage import TRAINED_BYTES
from drawplate.planner.bytes.storage import layer_bytes, loss_buffers, stored_linear
from drawplate.planner.shape import Choice, ModelShape, Surroundings
from drawplate.units import MIB

_Way = Literal["keep", "host", "again"]
GAP_SHARE = 0.12
GRANULE = 20 * MIB
SMALL_POOL = 8 * MIB


def estimate(model: ModelShape, choice: Choice, around: Surroundings | None = None) -> tuple[int, int]:
    """Peak bytes of (device, host), within a few percent of `ledger`."""
    around, model = around or Surroundings(), sketched(model)
    moments = _Moments(model, choice, around)
    places = [moments.loading(), moments.evaluation(), moments.training()]
    lines = HostLines(model, choice, around)
    if choice.device == "cpu":  # one place: the moments of both sides fall together
        rest = (lines.load(), lines.evaluation(), lines.checkpoint())
        return 0, max(sum(place) + _total(rows) for place, rows in zip(places, rest, strict=True))
    host = max(_total(lines.load()), _total(lines.checkpoint()))  # what is held at a checkpoint, other phases hold too
    transient, held = max(places, key=sum)
    share = GAP_SHARE if (transient, held) != places[0] else 0.0  # loading goes one tensor at a time
    gaps = int(share * transient) + GRANULE + SMALL_POOL
    trial = around.trial_bytes if choice.compiled else 0
    context = _total(context_lines(model, choice, around))
    return held + transient + trial + gaps + context, host


def _total(rows: list[Row]) -> int:
    return sum(size for _, size, _ in rows)


@dataclass(frozen=True)
class _Sums:
    """A trace in sums: the most it holds beside what was there, and what it leaves, its output not counted."""

    peak: int
    left: int


@dataclass(frozen=True)
class _PartSums:
    """A footprint's traces in sums; backward goes on from forward."""

    part: Footprint  # kept, so that its id, by which it is remembered, stays its own
    inference: _Sums
    forward: _Sums
    backward: _Sums


_REMEMBERED: dict[tuple[int, Rows], _PartSums] = {}
_MOST_REMEMBERED = 4096


def _sums_of(part: Footprint, rows: Rows) -> _PartSums:
    """Of a part for micro-batches of a size; remembered, because a search asks thousands of times."""
    key = (id(part), rows)
    if key not in _REMEMBERED:
        if len(_REMEMBERED) >= _MOST_REMEMBERED:
            _REMEMBERED.clear()
        inference, backward = _untried(part.inference), _untried(part.backward)
        _REMEMBERED[key] = _PartSums(part, *_sums((inference,), rows), *_sums((part.forward, backward), rows))
    return _REMEMBERED[key]


def _untried(trace: Trace) -> Trace:
    """Without what the compiler's trials take, which is added once."""
    return tuple(event for event in trace if event[0] != TRIAL)


def _sums(traces: Sequence[Trace], rows: Rows) -> list[_Sums]:
    """Of traces that go on from each other."""
    found, sizes = [], dict[str, int]()
    for trace in traces:
        held = peak = 0
        for name, line in trace:
            if line is None:
                held -= sizes.pop(name, 0)  # `grad_out` came from elsewhere
                continue
            sizes[name] = line.bytes(rows.tokens, rows.borders)
            held += sizes[name]
            peak = max(peak, held)
        found.append(_Sums(peak, held))
    return found


class _Moments:
    """(bytes that come and go, bytes that stay) at each moment where the peak can be."""

    def __init__(self, model: ModelShape, choice: Choice, around: Surroundings) -> None:
        self.model, self.choice, self.around = model, choice, around
        self.size = DTYPE_BYTES[choice.compute_dtype]
        self.rows = train_rows_of(choice, model)
        # Layers alike: (kind, tier, what becomes of activations) -> how many.
        self.groups: Counter[tuple[int, str, _Way]] = Counter()
        self.on_host, first_kept = choice.on_host(model.layers), model.layers - choice.kept_layers
        borders = sorted(
            {0, choice.dequantized_layers, choice.dequantized_layers + choice.device_layers, first_kept, self.on_host}
        )
        if len(model.kinds) == 1:
            ends = [*[b for b in borders[1:] if b < model.layers], model.layers]
            for start, end in zip([b for b in borders if b < model.layers], ends, strict=True):
                self.groups[0, choice.tier(start), self._way(start)] += end - start
        else:
            for i, kind in enumerate(model.kind_of_layer):
                self.groups[kind, choice.tier(i), self._way(i)] += 1
        self.stored = self._stored()
        self.trained = sum(n * sum(model.kinds[k].trained) for (k, _, _), n in self.groups.items()) * TRAINED_BYTES
        if choice.adapter == "host":  # one layer's, visiting
            self.trained = max(sum(kind.trained) for kind in model.kinds) * TRAINED_BYTES

    def _stored(self) -> int:
        model, choice = self.model, self.choice
        sizes = {
            (k, tier): layer_bytes(model.kinds[k], stored_linear(choice, tier), self.size) for k, tier, _ in self.groups
        }
        held = sum(n * sizes[k, tier] for (k, tier, _), n in self.groups.items() if tier != "host")
        away = [sizes[k, tier] for k, tier, _ in self.groups if tier == "host"]
        held += min(choice.slots, choice.host_layers(model.layers)) * max(away, default=0)
        rows = 0 if choice.table_on_host(model) else model.vocab
        if choice.head_rows:
            rows += 2 * min(choice.head_rows, model.vocab)
        elif not model.tied:
            rows += model.vocab
        return held + rows * model.hidden * self.size

    def loading(self) -> tuple[int, int]:
        """Everything stored, and a weight being quantized."""
        model = self.model
        largest = max(linear.out_features * linear.in_features for kind in model.kinds for linear in kind.linears)
        encoded = 12.0 if self.choice.precision == "int8" else 0.0 if self.choice.precision in PLAIN_DTYPES else 0.6
        quantizing = int(largest * (self.size + max(encoded, 2.0 if self.size != 2 else 0.0)))
        return quantizing, self.stored + self.trained

    def evaluation(self) -> tuple[int, int]:
        """The largest layer without gradients, before and after training."""
        rows, each = eval_rows_of(self.choice), self.model.hidden * self.size
        mode = self.choice.mode
        peak = max(
            _sums_of(self.model.kinds[k].footprints[mode(tier)], rows).inference.peak for k, tier, _ in self.groups
        )
        loss = self._loss(rows, training=False)
        held = self.stored + self._workspaces() + 3 * self.trained + 2 * rows.tokens * each
        return max(peak, loss + rows.tokens * each), held

    def training(self) -> tuple[int, int]:
        """The loss, the backward of the last layer, that of the last recomputed one, or that of the first; with layers
        on the host also forwards while what they send is leaving."""
        rows, choice, model = self.rows, self.choice, self.model
        each = rows.tokens * model.hidden * self.size
        parts = {
            (k, tier, way): model.kinds[k].footprints[choice.mode(tier, "again" if way == "again" else "kept")]
            for k, tier, way in self.groups
        }
        closing = model.closing[choice.mode(choice.tier(0))]
        opening = _sums_of(model.opening[choice.mode(choice.tier(0))], rows).inference.left
        sums = {key: _sums_of(part, rows) for key, part in parts.items()}
        keys = sum(n * 4 * parts[key].keys * rows.tokens for key, n in self.groups.items())
        # Saved sums count a layer's output as the next one's input.
        saves = {key: sums[key].forward.left - (0 if part.keeps_input else each) for key, part in parts.items()}
        sends = {key: self._sent(part) for key, part in parts.items() if key[2] == "host"}
        largest = max(sends.values(), key=sum, default=())
        kept = sum(n * saves[key] for key, n in self.groups.items() if key[2] == "keep")
        kept += (stays := sum(self.groups[key] * (saves[key] - sum(sent)) for key, sent in sends.items()))
        apart = sum(n for key, n in self.groups.items() if key[2] == "again")
        inputs = each * (1 if choice.policy == "offload" and apart else apart + 1)
        held = self.stored + self._workspaces() + 3 * self.trained + opening + keys + 24 * rows.tokens
        held += self.trained  # gradients
        own = self.trained if choice.captured(model) else 0  # a captured micro-step's gradients
        norm = _sums_of(closing, rows)
        saved = kept + inputs if apart else kept + each
        ends = [(self._loss(rows, training=True) + norm.forward.left, held + saved)]
        ends.append((norm.backward.peak + norm.forward.left + 2 * each, held + saved))
        mine = 0 if choice.policy == "offload" else each * apart
        mine += RETURN_BUFFERS * each if choice.policy == "offload" and apart else 0
        during, after, last = leaving(model.layers, self.on_host, largest)
        back = stays + most_back(model.layers, self.on_host, choice.kept_layers, largest)
        for key, part in sums.items():
            if key[2] == "keep":
                ends.append((part.backward.peak + each, held + own + saved))
                going = (part.forward.peak + each, held + saved - saves[key] + last)
            elif key[2] == "host":
                ends.append((part.backward.peak + each, held + own + back))
                going = (part.forward.peak + 2 * each, held + stays + during)
            else:
                work = max(part.forward.peak, part.forward.left + part.backward.peak) + each
                ends.append((work, held + own + mine + back))
                inferred = _sums_of(model.kinds[key[0]].footprints[choice.mode(key[1])], rows)
                going = (inferred.inference.peak + 2 * each, held + stays + after)
            ends += [going] * bool(self.on_host)
        return max(ends, key=sum)

    def _sent(self, part: Footprint) -> tuple[int, ...]:
        hidden = self.rows.tokens * self.model.hidden * self.size
        return tuple(sent_blocks(part, self.rows.tokens, self.rows.borders, hidden).values())

    def _way(self, layer: int) -> _Way:
        if layer >= self.model.layers - self.choice.kept_layers:
            return "keep"
        return "host" if layer < self.on_host else "again"

    def _workspaces(self) -> int:
        streams = 2 if self.choice.captured(self.model) else 1
        return 2 * streams * self.around.product_workspace_bytes if self.choice.device == "cuda" else 0

    def _loss(self, rows: Rows, *, training: bool) -> int:
        width = rows.counted * self.model.hidden
        tile = sum(loss_buffers(self.model, self.choice, rows.counted, training=training))
        compact = width * self.size if rows.counted < rows.tokens else 0
        return tile + compact + (width * (4 + self.size) if training else 0) + 40 * rows.tokens
