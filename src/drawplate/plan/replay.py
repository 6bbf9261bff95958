"""A run on paper: every block of memory that comes and goes on the device, in order, under the allocator's rules.

    load -> baseline evaluation -> optimizer steps -> final evaluation

What each part does to memory is a trace (plan/shape.py); this file strings them together as model/layers.py,
model/saved_inputs.py, model/loss.py and train.py do. Every block belongs to a line of the ledger, so that the highest
moment of a phase can be read off line by line.

Left out: blocks below a kilobyte that live for one operation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from drawplate.footprints import TRIAL, Footprint, Trace
from drawplate.plan.allocator import CachingAllocator, ProcessMemory
from drawplate.plan.blocks import Device, Moment, Name
from drawplate.plan.shape import DTYPE_BYTES, PLAIN, Choice, ModelShape, Surroundings
from drawplate.plan.storage import Storage, layer_bytes, loss_tile

RETURN_BUFFERS = 2
TRIED_VARIANTS = 2
COUNTED_PARTS = 8
TRAINED_BYTES = 4
IN_FLOAT32 = ("int8", "fp8")
VISITS = 2
"""Copies of a layer's adapter on the device while the adapter lives on the host: its values and its gradients."""


@dataclass(frozen=True)
class Rows:
    """Micro-batches as attention and loss see them."""

    tokens: int
    rows: int
    documents: int
    packing: bool
    roomy: bool = False

    @property
    def borders(self) -> int:
        """Of a packed row, rounded up as model/causal_lm.py does; without the first."""
        return max(64, 1 << (self.documents + 1).bit_length()) - 1 if self.packing else 0

    @property
    def counted(self) -> int:
        """Tokens that the loss counts, at most: none counts the first of a document. Where micro-steps are captured
        they are rounded up to an eighth (model/device_batch.py)."""
        counted = max(1, self.tokens - (self.documents if self.packing else self.rows))
        part = -(-self.tokens // COUNTED_PARTS) if self.roomy else 1
        return min(self.tokens, -(-counted // part) * part)


def train_rows_of(choice: Choice, model: ModelShape) -> Rows:
    """Training micro-batches."""
    rows = Rows(choice.micro_batch_tokens, choice.rows, choice.documents, choice.packing)
    return replace(rows, roomy=choice.captured(model))


def eval_rows_of(choice: Choice) -> Rows:
    """Evaluation micro-batches."""
    tokens, rows = choice.eval_tokens or choice.micro_batch_tokens, choice.eval_rows or choice.rows
    return Rows(tokens, rows, choice.documents, choice.packing)


class Replay:
    """Phases of a run, each a method that returns its highest moment; to be called in the run's order."""

    def __init__(self, model: ModelShape, choice: Choice, around: Surroundings) -> None:
        self.model, self.choice, self.around = model, choice, around
        self.size = DTYPE_BYTES[choice.compute_dtype]
        self.device = Device(CachingAllocator() if choice.device == "cuda" else ProcessMemory())
        self.train_rows, self.eval_rows = train_rows_of(choice, model), eval_rows_of(choice)
        self._left: dict[Name, dict[Name, None]] = {}
        self._tried: set[tuple[int, Rows]] = set()
        self._resolved: dict[tuple[int, Rows], tuple[Trace, list[tuple[str, int | None]]]] = {}
        self._kinds = [model.kinds[k] for k in model.kind_of_layer]
        self._inner = [choice.mode(choice.tier(i)) for i in range(model.layers)]
        self._kept = [choice.mode(choice.tier(i), kept=True) for i in range(model.layers)]
        self._trained = [kind.trained for kind in self._kinds]
        self._first_kept = model.layers - choice.kept_layers
        self.captured = choice.captured(model)

    # --- phases ---------------------------------------------------------------------------------------------------

    def load(self) -> Moment:
        """Weights, adapter, embedding and head."""
        device, choice, model = self.device, self.choice, self.model
        device.now = "quantizing the first layer"
        storages = [Storage.of(choice, choice.tier(i)) for i in range(model.layers)]
        sizes = [layer_bytes(kind, storage, self.size) for kind, storage in zip(self._kinds, storages, strict=True)]
        for i, size in enumerate(sizes):
            if choice.tier(i) != "host":
                line = (
                    "frozen weights, dequantized" if choice.tier(i) == "dequantized" else "frozen weights on the device"
                )
                device.take(line, ("weights", i), size)
        away = [size for i, size in enumerate(sizes) if choice.tier(i) == "host"]
        for slot in range(min(choice.slots, len(away))):
            device.take("ring slots", ("slot", slot), max(away))
        for linear in self._kinds[0].linears:
            self._quantize(linear.out_features * linear.in_features)
        device.give_all(name for i in range(3) if device.has(name := ("before", i)))
        for i, trained in enumerate(self._trained):
            for j, count in enumerate(trained if choice.adapter == "device" else ()):
                device.take("adapter", ("adapter", i, j), count * TRAINED_BYTES)
            device.take("small tensors", ("salts", i), 4)
        if choice.adapter == "host":
            largest = max(sum(trained) for trained in self._trained)
            device.take("adapter of a layer, visiting", ("visit",), VISITS * largest * TRAINED_BYTES)
        self._load_outside()
        if self.around.self_check and model.parameters * self.size <= 2**30:
            self._self_check()
        return device.end()

    def _quantize(self, count: int) -> None:
        """One weight on its way: as read, in the compute dtype, and encoded; the one before it is still held."""
        line, device = "a weight being quantized", self.device
        device.take(line, ("read",), count * 2)
        names: list[Name] = [("read",)]
        if self.size != 2:
            device.take(line, ("cast",), count * self.size)
            device.give(names.pop())
            names.append(("cast",))
        encoded = names if self.choice.precision in PLAIN else self._encode(count, names)
        device.give_all(name for i in range(3) if device.has(name := ("before", i)))
        for i, block in enumerate(encoded):
            device.rename(block, ("before", i))

    def _encode(self, count: int, read: list[Name]) -> list[Name]:
        """The blocks of an encoded weight; what it was read into is let go of last."""
        line, device = "a weight being quantized", self.device
        if self.choice.precision in IN_FLOAT32:  # as float32, divided, rounded
            passing: list[Name] = [("float",), ("divided",), ("rounded",)]
            device.take(line, passing[0], count * 4)
            device.take(line, passing[1], count * 4)
            device.give(passing[0])
            device.take(line, passing[2], count * 4)
            device.give(passing[1])
            parts = [count]
        else:
            passing, parts = [], [count // 2, count // 16, count // 64]
        names: list[Name] = [("encoded", i) for i in range(len(parts))]
        for name, part in zip(names, parts, strict=True):
            device.take(line, name, part)
        device.give_all(passing[2:])
        device.give_all(read)
        return names

    def _load_outside(self) -> None:
        model, choice, device = self.model, self.choice, self.device
        table = model.vocab * model.hidden * self.size
        tables = table * (1 if model.tied else 2)
        inside = sum(sum(kind.plain) for kind in self._kinds)
        others = max(0, model.outside_parameters - inside) * self.size - tables
        if not choice.head_rows:
            device.take("embedding and head", ("embedding",), table)
            if not model.tied:
                device.take("embedding and head", ("head",), table)
        else:
            for slot in range(2):
                rows = min(choice.head_rows, model.vocab)
                device.take("head slots", ("head slot", slot), rows * model.hidden * self.size)
        device.take("small tensors", ("norm",), max(0, others))

    def _self_check(self) -> None:
        """transformers' own module beside ours, on a short text (model/self_check.py)."""
        self.device.now = "self-check"
        inside = self.model.linear_parameters + sum(sum(kind.plain) for kind in self._kinds)
        line, tokens = "self-check", 64
        self.device.take(line, ("copy",), inside * self.size)
        self.device.take(line, ("copy of the head",), self.model.vocab * self.model.hidden * self.size)
        self.device.take(line, ("logits",), tokens * self.model.vocab * (self.size + 8))
        self.device.give_all([("copy",), ("copy of the head",), ("logits",)])

    def evaluation(self) -> Moment:
        """One micro-batch without gradients. Captured micro-steps have given their memory back before it."""
        self.device.now = "before the first layer"
        self.device.forget_capture()
        self._drop_keys()
        self.device.begin()
        rows = self.eval_rows
        self._open(rows)
        hidden: Name = ("embedded",)
        for i in range(self.model.layers):
            self.device.now = f"evaluating layer {i}"
            hidden = self._infer(i, hidden, rows)
        self.device.now = "evaluating the head"
        self._run(self._closing().inference, "layer being computed", ("closing",), rows)
        self._drop_hidden(hidden)
        self.device.give(("embedded",))
        self._give_shared()
        self._loss(rows, ("closing", "out"), training=False)
        self.device.give(("closing", "out"))
        self._give_batch()
        return self.device.end()

    def training(self) -> Moment:
        """Two optimizer steps: in the first the moments come, in the second they are there.

        Where micro-steps are captured the first is launched, and the second is the capture."""
        device = self.device
        device.now = "before the first layer"
        device.begin()
        self._make_gradients()
        self._micro_batch(self.train_rows)
        self._update()
        if self.captured:
            device.begin_capture()
            self._graph_inputs(self.train_rows)
        self._micro_batch(self.train_rows)
        device.end_capture()
        self._update()
        return device.end()

    def checkpoint(self) -> Moment:
        """The adapter is copied to the host: nothing more on the device."""
        self.device.now = "copying the adapter"
        self.device.begin()
        return self.device.end()

    # --- an optimizer step ----------------------------------------------------------------------------------------

    def _make_gradients(self) -> None:
        """One run of zeros for all trained tensors, which stays (model/adapter.py, `zero_gradients`)."""
        if self.choice.adapter == "device":
            count = sum(sum(trained) for trained in self._trained)
            self.device.take("adapter gradients", ("gradients",), count * TRAINED_BYTES)

    def _graph_inputs(self, rows: Rows) -> None:
        """What a captured micro-step reads: its own copy of the batch."""
        size = (24 + (4 if self.choice.dropout else 0)) * rows.tokens + 4 * (rows.borders + 1)
        self.device.take("captured micro-step: its batch", ("graph batch",), size)

    def _update(self) -> None:
        """AdamW: two moments for each trained number, and a step count for each tensor."""
        if self.choice.adapter == "host":
            return
        self.device.now = "the optimizer's step"
        each = TRAINED_BYTES if self.choice.optimizer == "adamw" else 1
        for i, trained in enumerate(self._trained):
            for j, count in enumerate(trained):
                if self.device.has(("moment", i, j, 0)):
                    return
                self.device.take("small tensors", ("count", i, j), 4)
                for k in range(2):
                    self.device.take("optimizer moments", ("moment", i, j, k), count * each)

    def _micro_batch(self, rows: Rows) -> None:
        if self.choice.dropout:
            self.device.take("batch and what layers share", ("keys",), 4 * rows.tokens)
            self._dropout_keys(rows)
        self._open(rows)
        hidden: Name = ("embedded",)
        for i in range(self.model.layers):
            self.device.now = f"layer {i}, forward"
            hidden = self._forward(i, hidden, rows)
        self.device.now = "the norm after the last layer"
        closing = self._closing()
        self._run(closing.forward, "the norm after the last layer", ("closing",), rows)
        if not closing.keeps_input and hidden not in self._held_inputs():
            self._drop_hidden(hidden)
        if self._offloads(0) or self._keeps(0):  # the first layer's input needs no gradient: autograd keeps it not
            self.device.give(("embedded",))
        self.device.now = "the loss"
        self._loss(rows, ("closing", "out"), training=True)
        self.device.give(("closing", "out"))
        self._backward(rows, hidden, closing)
        self._add_up()
        self._give_shared()
        self._give_batch()
        if self.device.has(("keys",)):
            self.device.give(("keys",))

    def _dropout_keys(self, rows: Rows) -> None:
        """All layers' at once, which stay until the next micro-batch has its own; made with two blocks more."""
        device, line = self.device, "dropout keys of the layers"
        kinds, modes = self._kinds, (self._kept if self.choice.kept_layers else self._inner)
        count = sum(kind.footprints[mode].keys for kind, mode in zip(kinds, modes, strict=True))
        names: list[Name] = [("key work", 0), ("key work", 1), ("new keys",)]
        for name in names if count else ():
            device.take(line, name, 4 * count * rows.tokens)
        device.give_all(names[:2] if count else ())
        if device.has(("layer keys",)):
            device.give(("layer keys",))
        if count:
            device.rename(("new keys",), ("layer keys",))

    def _drop_keys(self) -> None:
        if self.device.has(("layer keys",)):
            self.device.give(("layer keys",))

    def _keeps(self, layer: int) -> bool:
        return layer >= self._first_kept

    def _offloads(self, layer: int) -> bool:
        return not self._keeps(layer) and self.choice.policy == "offload"

    def _held_inputs(self) -> set[Name]:
        return {self._input(i) for i in range(self.model.layers) if not self._offloads(i)}

    @staticmethod
    def _input(layer: int) -> Name:
        return ("hidden", layer) if layer else ("embedded",)

    def _forward(self, layer: int, hidden: Name, rows: Rows) -> Name:
        """A layer's forward in training -> the block of its output."""
        device, kind = self.device, self._kinds[layer]
        keeps = self._keeps(layer)
        part = kind.footprints[(self._kept if keeps else self._inner)[layer]]
        if self._offloads(layer) and layer and device.has(("leaving",)):
            device.give(("leaving",))
        line = "activations kept" if keeps else "layer being computed"
        self._run(part.forward if keeps else part.inference, line, ("layer", layer), rows, sparing=not keeps)
        output: Name = ("hidden", layer + 1)
        device.rename(("layer", layer, "out"), output, "layer inputs kept")
        if self._offloads(layer) and layer:
            device.rename(hidden, ("leaving",), "layer input on its way to the host")
        return output

    def _backward(self, rows: Rows, hidden: Name, closing: Footprint) -> None:
        device, model = self.device, self.model
        device.now = "the loss, backward"
        gradient = rows.counted * model.hidden * self.size
        device.take("loss", ("scaled",), gradient)
        if rows.counted < rows.tokens:
            device.take("gradient between layers", ("grad",), rows.tokens * model.hidden * self.size)
            device.give(("scaled",))
        else:
            device.rename(("scaled",), ("grad",), "gradient between layers")
        device.give(("loss gradient",))
        device.now = "the norm after the last layer, backward"
        device.rename(("grad",), ("closing", "grad_out"))
        self._run(closing.backward, "the norm after the last layer", ("closing",), rows)
        if device.has(("closing", "grad_out")):
            device.rename(("closing", "grad_out"), ("grad",))
        self._pass_gradient(("closing",))
        if device.has(("leaving",)):
            device.give(("leaving",))
        if device.has(hidden):
            device.give(hidden)
        for layer in reversed(range(model.layers)):
            self._layer_backward(layer, rows)
        device.give(("grad",))
        if device.has(("embedded",)):
            device.give(("embedded",))

    def _layer_backward(self, layer: int, rows: Rows) -> None:
        device, kind, keeps = self.device, self._kinds[layer], self._keeps(layer)
        part = kind.footprints[(self._kept if keeps else self._inner)[layer]]
        prefix: Name = ("layer", layer)
        device.now = f"layer {layer}, " + ("backward" if keeps else "recomputed and backward")
        line = "backward of a kept layer" if keeps else "layer being recomputed"
        if self._offloads(layer):
            for i in range(RETURN_BUFFERS):
                if not device.has(("return", i)):
                    device.take(
                        "return buffers of offloaded inputs", ("return", i), rows.tokens * self.model.hidden * self.size
                    )
        self._product_workspace("backward")
        if not keeps:
            self._run(part.forward, line, prefix, rows, sparing=False)
        self._run(part.backward, line, prefix, rows)
        for j in range(len(self._trained[layer])):
            self._accumulate((*prefix, f"grad:{j}"), ("new", layer, j))
        self._pass_gradient(prefix)
        if layer and not self._offloads(layer):
            device.give(self._input(layer))

    def _pass_gradient(self, prefix: Name) -> None:
        """A part's gradient to its input is the next part's to its output; all else of the part is let go of."""
        self.device.rename((*prefix, "grad_in"), ("next grad",), "gradient between layers")
        self._clear(prefix)
        if self.device.has(("grad",)):
            self.device.give(("grad",))
        self.device.rename(("next grad",), ("grad",))

    def _accumulate(self, new: Name, later: Name) -> None:
        """A gradient is added to the parameter's, by a captured micro-step only at its end."""
        if not self.device.has(new):
            return
        if self.device.capturing:
            self.device.rename(new, later, "captured micro-step: its own gradients")
        else:
            self.device.give(new)

    def _add_up(self) -> None:
        """The end of a captured micro-step: its gradients are added to the parameters'."""
        for i, trained in enumerate(self._trained):
            self.device.give_all(("new", i, j) for j in range(len(trained)) if self.device.has(("new", i, j)))

    # --- parts ----------------------------------------------------------------------------------------------------

    def _product_workspace(self, thread: str) -> None:
        """cuBLAS keeps one for each thread and stream that multiplies; a capture has a stream of its own."""
        name: Name = ("cublas", thread, self.device.capturing)
        if self.choice.device == "cuda" and not self.device.has(name):
            self.device.take("cuBLAS workspace", name, self.around.product_workspace_bytes)

    def _open(self, rows: Rows) -> None:
        """The batch, its embedding, and what all layers share."""
        line = "batch and what layers share"
        self.device.now = "the embedding"
        if not self.choice.head_rows:
            self.device.take(line, ("ids",), 8 * rows.tokens)
        self.device.take("layer inputs kept", ("embedded",), rows.tokens * self.model.hidden * self.size)
        if self.device.has(("ids",)):
            self.device.give(("ids",))
        self.device.take(line, ("positions",), 8 * rows.tokens)
        self._product_workspace("forward")
        self._run(self.model.opening[self._inner[0]].inference, line, ("shared",), rows)

    def _give_shared(self) -> None:
        self._clear(("shared",))

    def _give_batch(self) -> None:
        self.device.give(("positions",))

    def _closing(self) -> Footprint:
        return self.model.closing[self._inner[0]]

    def _infer(self, layer: int, hidden: Name, rows: Rows) -> Name:
        part = self._kinds[layer].footprints[self._inner[layer]]
        self._run(part.inference, "layer being computed", ("layer", layer), rows)
        output: Name = ("hidden", layer + 1)
        self.device.rename(("layer", layer, "out"), output)
        self._drop_hidden(hidden)
        return output

    def _drop_hidden(self, hidden: Name) -> None:
        """All but the embedding's output, which the body's caller holds."""
        if hidden != ("embedded",) and self.device.has(hidden):
            self.device.give(hidden)

    def _loss(self, rows: Rows, hidden: Name, *, training: bool) -> None:
        """model/loss.py: the tokens that count, their sums, a tile of logits; the gradient stays."""
        device, counted, width, line = self.device, rows.counted, self.model.hidden, "loss"
        tile = loss_tile(self.model, self.choice, counted, training=training)
        parts = {"targets": 16 * rows.tokens, "counted": 8 * rows.tokens}
        if counted < rows.tokens:
            parts["compact"] = counted * width * self.size
        if training:
            parts |= {"gradient": counted * width * 4}
        parts |= {f"sums{i}": counted * 4 for i in range(4)}
        if training:
            parts["target rows"] = counted * width * self.size
        parts |= {f"tile{i}": part for i, part in enumerate(tile)}
        for name, size in parts.items():
            device.take(line, ("loss", name), size)
        if training:
            device.rename(("loss", "target rows"), ("loss gradient",))
            del parts["target rows"]
        device.give_all(("loss", name) for name in reversed(parts))

    def _run(self, trace: Trace, line: str, prefix: Name, rows: Rows, *, sparing: bool = True) -> None:
        """Replay a trace, its blocks under a prefix. A compiled layer's kernels are tried when they first run."""
        device, left = self.device, self._left.setdefault(prefix, {})
        tried = self.choice.device != "cuda" or (id(trace), rows) in self._tried
        self._tried.add((id(trace), rows))
        copies: list[int] = []
        for name, size in self._bytes(trace, rows):
            full = (*prefix, name)
            if name.startswith(TRIAL):
                if size is not None:
                    copies.append(size)
                elif copies:
                    if not tried:
                        self._try([copy for copy in copies if copy], sparing=sparing)
                    copies = []
            elif size is None:
                device.give(full)
                left.pop(full, None)
            else:
                device.take(line, full, size)
                left[full] = None

    def _try(self, copies: list[int], *, sparing: bool) -> None:
        """Variants of a kernel are run and timed, each on copies of what it writes in place.

        Between runs the L2 cache is cleared by a block of its size. Where a graph is not the forward of a training
        step (`sparing`) a copy that would raise the peak so far lies in host memory instead."""
        device, line = self.device, "compiler's trial of a kernel"
        for _ in range(TRIED_VARIANTS):
            room = device.highest.allocated - self.device.memory.allocated
            names: list[tuple[Name, int]] = []
            for i, copy in enumerate(copies):
                if not sparing or copy <= room:
                    names.append((("copy", i), copy))
                    room -= copy
            self._pass_by(line, names)
            device.take(line, ("trial",), self.around.trial_bytes)
            self._pass_by(line, names)
            device.give(("trial",))

    def _pass_by(self, line: str, blocks: list[tuple[Name, int]]) -> None:
        for name, size in blocks:
            self.device.take(line, name, size)
        self.device.give_all(name for name, _ in blocks)

    def _bytes(self, trace: Trace, rows: Rows) -> list[tuple[str, int | None]]:
        key = (id(trace), rows)
        if key not in self._resolved:
            tokens, borders = rows.tokens, rows.borders
            sizes = [(name, None if line is None else line.bytes(tokens, borders)) for name, line in trace]
            self._resolved[key] = (trace, sizes)  # the trace too, so that its id is not another's
        return self._resolved[key][1]

    def _clear(self, prefix: Name) -> None:
        """Let go of what is left of a part."""
        for name in self._left.pop(prefix, {}):
            if self.device.has(name):
                self.device.give(name)
