"""Loading on paper: weights one by one on their way, what stays of them, adapter, embedding and head."""

from __future__ import annotations

from drawplate.layout.stored_linear import PLAIN_DTYPES
from drawplate.planner.bytes.blocks import Name
from drawplate.planner.bytes.stage import TRAINED_BYTES, Stage
from drawplate.planner.bytes.storage import layer_bytes, stored_linear

IN_FLOAT32 = ("int8", "fp8")
VISITS = 2
"""Copies of a layer's adapter on the device while the adapter lives on the host: its values and its gradients."""


class Loading:
    """Everything that is on the device before the first micro-batch, and what passes by on the way."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.model, self.choice = stage.model, stage.choice
        self.device, self.size = stage.device, stage.size

    def run(self) -> None:
        """Weights, adapter, embedding and head."""
        device, choice, model = self.device, self.choice, self.model
        device.now = "quantizing the first layer"
        storages = [stored_linear(choice, choice.tier(i)) for i in range(model.layers)]
        sizes = [
            layer_bytes(kind, storage, self.size) for kind, storage in zip(self.stage.kinds, storages, strict=True)
        ]
        for i, size in enumerate(sizes):
            if choice.tier(i) != "host":
                line = (
                    "frozen weights, dequantized" if choice.tier(i) == "dequantized" else "frozen weights on the device"
                )
                device.take(line, ("weights", i), size)
        away = [size for i, size in enumerate(sizes) if choice.tier(i) == "host"]
        for slot in range(min(choice.slots, len(away))):
            device.take("ring slots", ("slot", slot), max(away))
        for linear in self.stage.kinds[0].linears:
            self._quantize(linear.out_features * linear.in_features)
        device.give_all(name for i in range(3) if device.has(name := ("before", i)))
        self._load_adapter()
        self._load_outside()

    def _load_adapter(self) -> None:
        choice, device = self.choice, self.device
        for i, trained in enumerate(self.stage.trained):
            for j, count in enumerate(trained if choice.adapter == "device" else ()):
                device.take("adapter", ("adapter", i, j), count * TRAINED_BYTES)
            device.take("small tensors", ("salts", i), 4)
        if choice.adapter == "host":
            largest = max(sum(trained) for trained in self.stage.trained)
            device.take("adapter of a layer, visiting", ("visit",), VISITS * largest * TRAINED_BYTES)

    def _quantize(self, count: int) -> None:
        """One weight on its way: as read, in the compute dtype, and encoded; the one before it is still held."""
        line, device = "a weight being quantized", self.device
        device.take(line, ("read",), count * 2)
        names: list[Name] = [("read",)]
        if self.size != 2:
            device.take(line, ("cast",), count * self.size)
            device.give(names.pop())
            names.append(("cast",))
        encoded = names if self.choice.precision in PLAIN_DTYPES else self._encode(count, names)
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
        inside = sum(sum(kind.plain) for kind in self.stage.kinds)
        others = max(0, model.outside_parameters - inside) * self.size - tables
        if not choice.table_on_host(model):
            device.take("embedding and head", ("embedding",), table)
        if not choice.head_rows:
            if not model.tied:
                device.take("embedding and head", ("head",), table)
        else:
            for slot in range(2):
                rows = min(choice.head_rows, model.vocab)
                device.take("head slots", ("head slot", slot), rows * model.hidden * self.size)
        device.take("small tensors", ("norm",), max(0, others))
