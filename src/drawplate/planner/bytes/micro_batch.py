"""A micro-batch on paper, as the model (layer/runner.py, stream/layer_inputs.py, ends/loss.py) and train/loop.py do it.

    batch -> embedding -> layers -> the norm after them -> loss -> and back

What a layer does is its trace (model/footprint/measure.py); here is what lies between: inputs kept or offloaded,
gradients handed from layer to layer, the loss's tile. Layers that keep their activations in host memory are
planner/bytes/host_kept.py's.
"""

from __future__ import annotations

from drawplate.layout.buffers import RETURN_BUFFERS
from drawplate.layout.footprint import Footprint
from drawplate.planner.bytes.batch_rows import Rows
from drawplate.planner.bytes.blocks import Name
from drawplate.planner.bytes.host_kept import LINE, HostKept
from drawplate.planner.bytes.stage import Stage, input_of
from drawplate.planner.bytes.storage import loss_buffers


class MicroBatch:
    """Micro-batches on a stage, one after another."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.model, self.choice = stage.model, stage.choice
        self.device, self.size = stage.device, stage.size
        self._first_kept = stage.model.layers - stage.choice.kept_layers
        self._host_kept = HostKept(stage)
        # Taken by model/cuda_graphs.py, launched or captured: it brings its own gradients and lets its buffers go.
        self._graphed = stage.choice.captured(stage.model)

    def train(self, rows: Rows) -> None:
        """Forward and backward; gradients are added to the adapter's."""
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
        self.stage.run(closing.forward, "the norm after the last layer", ("closing",), rows)
        if not closing.keeps_input and hidden not in self._held_inputs():
            self._drop_hidden(hidden)
        if self._offloads(0) or self._keeps(0):  # the first layer's input needs no gradient: autograd keeps it not
            self.device.give(("embedded",))
        self.device.now = "the loss"
        self._loss(rows, ("closing", "out"), training=True)
        self.device.give(("closing", "out"))
        self._backward(rows, hidden, closing)
        if self._graphed:
            self.device.give_all(("return", i) for i in range(RETURN_BUFFERS) if self.device.has(("return", i)))
        self._add_up()
        self._give_shared()
        self._give_batch()
        if self.device.has(("keys",)):
            self.device.give(("keys",))

    def evaluate(self, rows: Rows) -> None:
        """Without gradients."""
        self._open(rows)
        hidden: Name = ("embedded",)
        for i in range(self.model.layers):
            self.device.now = f"evaluating layer {i}"
            hidden = self._infer(i, hidden, rows)
        self.device.now = "evaluating the head"
        self.stage.run(self._closing().inference, "layer being computed", ("closing",), rows)
        self._drop_hidden(hidden)
        self.device.give(("embedded",))
        self._give_shared()
        self._loss(rows, ("closing", "out"), training=False)
        self.device.give(("closing", "out"))
        self._give_batch()

    def drop_keys(self) -> None:
        """The last micro-batch's dropout keys are let go of."""
        if self.device.has(("layer keys",)):
            self.device.give(("layer keys",))

    def _dropout_keys(self, rows: Rows) -> None:
        """All layers' at once, which stay until the next micro-batch has its own; made with two blocks more."""
        device, line = self.device, "dropout keys of the layers"
        kinds, modes = self.stage.kinds, self.stage.inferred
        count = sum(kind.footprints[mode].keys for kind, mode in zip(kinds, modes, strict=True))
        names: list[Name] = [("key work", 0), ("key work", 1), ("new keys",)]
        for name in names if count else ():
            device.take(line, name, 4 * count * rows.tokens)
        device.give_all(names[:2] if count else ())
        if device.has(("layer keys",)):
            device.give(("layer keys",))
        if count:
            device.rename(("new keys",), ("layer keys",))

    def _keeps(self, layer: int) -> bool:
        return layer >= self._first_kept or layer in self._host_kept

    def _offloads(self, layer: int) -> bool:
        return not self._keeps(layer) and self.choice.policy == "offload"

    def _held_inputs(self) -> set[Name]:
        return {input_of(i) for i in range(self.model.layers) if not self._offloads(i)}

    def _forward(self, layer: int, hidden: Name, rows: Rows) -> Name:
        """A layer's forward in training -> the block of its output."""
        device, kind = self.device, self.stage.kinds[layer]
        keeps = self._keeps(layer)
        part = kind.footprints[(self.stage.kept if keeps else self.stage.inferred)[layer]]
        if self._offloads(layer) and layer and device.has(("leaving",)):
            device.give(("leaving",))
        line = LINE if layer in self._host_kept else "activations kept" if keeps else "layer being computed"
        self.stage.run(part.forward if keeps else part.inference, line, ("layer", layer), rows)
        output: Name = ("hidden", layer + 1)
        device.rename(("layer", layer, "out"), output, "layer inputs kept")
        if self._offloads(layer) and layer:
            device.rename(hidden, ("leaving",), "layer input on its way to the host")
        if keeps and not part.keeps_input:
            self._drop_hidden(hidden)
        self._host_kept.end_forward(layer, rows)
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
        self.stage.run(closing.backward, "the norm after the last layer", ("closing",), rows)
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
        device, kind, keeps = self.device, self.stage.kinds[layer], self._keeps(layer)
        part = kind.footprints[(self.stage.kept if keeps else self.stage.again)[layer]]
        prefix: Name = ("layer", layer)
        device.now = f"layer {layer}, " + ("backward" if keeps else "recomputed and backward")
        line = "backward of a kept layer" if keeps else "layer being recomputed"
        self._host_kept.begin_backward(layer)
        if self._offloads(layer) or (layer and self._offloads(layer - 1)):  # the next one's begins its way back
            for i in range(RETURN_BUFFERS):
                if not device.has(("return", i)):
                    device.take(
                        "return buffers of offloaded inputs", ("return", i), rows.tokens * self.model.hidden * self.size
                    )
        if not keeps:
            self.stage.run(part.forward, line, prefix, rows, multiplies="backward")
        self.stage.run(part.backward, line, prefix, rows, multiplies="backward")
        for j in range(len(self.stage.trained[layer])):
            self._accumulate((*prefix, f"grad:{j}"), ("new", layer, j))
        self._pass_gradient(prefix)
        if layer and device.has(input_of(layer)):
            device.give(input_of(layer))

    def _pass_gradient(self, prefix: Name) -> None:
        """A part's gradient to its input is the next part's to its output; all else of the part is let go of."""
        self.device.rename((*prefix, "grad_in"), ("next grad",), "gradient between layers")
        self.stage.clear(prefix)
        if self.device.has(("grad",)):
            self.device.give(("grad",))
        self.device.rename(("next grad",), ("grad",))

    def _accumulate(self, new: Name, later: Name) -> None:
        """A gradient is added to the parameter's, by one that is or will be captured only at its end."""
        if not self.device.has(new):
            return
        if self._graphed:
            self.device.rename(new, later, "captured micro-step: its own gradients")
        else:
            self.device.give(new)

    def _add_up(self) -> None:
        """The end of such a micro-step: its gradients are added to the parameters'."""
        for i, trained in enumerate(self.stage.trained):
            self.device.give_all(("new", i, j) for j in range(len(trained)) if self.device.has(("new", i, j)))

    def _open(self, rows: Rows) -> None:
        """The batch, its embedding, and what all layers share."""
        line = "batch and what layers share"
        self.device.now = "the embedding"
        self.device.take(line, ("ids",), 8 * rows.tokens)
        self.device.take("layer inputs kept", ("embedded",), rows.tokens * self.model.hidden * self.size)
        self.device.give(("ids",))
        self.device.take(line, ("positions",), 8 * rows.tokens)
        self.stage.product_workspace("forward")
        self.stage.run(self.model.opening[self.stage.inferred[0]].inference, line, ("shared",), rows)

    def _give_shared(self) -> None:
        self.stage.clear(("shared",))

    def _give_batch(self) -> None:
        self.device.give(("positions",))

    def _closing(self) -> Footprint:
        return self.model.closing[self.stage.inferred[0]]

    def _infer(self, layer: int, hidden: Name, rows: Rows) -> Name:
        part = self.stage.kinds[layer].footprints[self.stage.inferred[layer]]
        self.stage.run(part.inference, "layer being computed", ("layer", layer), rows)
        output: Name = ("hidden", layer + 1)
        self.device.rename(("layer", layer, "out"), output)
        self._drop_hidden(hidden)
        return output

    def _drop_hidden(self, hidden: Name) -> None:
        """All but the embedding's output, which the body's caller holds."""
        if hidden != ("embedded",) and self.device.has(hidden):
            self.device.give(hidden)

    def _loss(self, rows: Rows, hidden: Name, *, training: bool) -> None:
        """model/ends/loss.py: the tokens that count, their sums, a tile of logits; the gradient stays."""
        device, counted, width, line = self.device, rows.counted, self.model.hidden, "loss"
        tile = loss_buffers(self.model, self.choice, counted, training=training)
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
