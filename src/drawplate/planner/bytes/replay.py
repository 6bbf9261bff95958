"""A run on paper: every block of memory that comes and goes on the device, in order, under the allocator's rules.

    load -> baseline evaluation -> optimizer steps -> final evaluation

What each part does to memory is a trace (layout/footprint.py); planner/bytes/loading.py and
planner/bytes/micro_batch.py string traces together as the code does, and this file the phases. Every block belongs to a
line of the ledger, so that the highest moment of a phase can be read off line by line.

Left out: blocks below a kilobyte that live for one operation.
"""

from __future__ import annotations

from drawplate.layout.moments import MOMENTS, moment_blocks
from drawplate.planner.bytes.batch_rows import Rows, eval_rows_of, train_rows_of
from drawplate.planner.bytes.blocks import Moment
from drawplate.planner.bytes.loading import Loading
from drawplate.planner.bytes.micro_batch import MicroBatch
from drawplate.planner.bytes.stage import TRAINED_BYTES, Stage
from drawplate.planner.shape import Choice, ModelShape, Surroundings

CAPTURES = 2
"""From then on each is like the one before it."""


class Replay:
    """Phases of a run, each a method that returns its highest moment; to be called in the run's order."""

    def __init__(self, model: ModelShape, choice: Choice, around: Surroundings) -> None:
        self.stage = Stage(model, choice, around)
        self.choice, self.device = choice, self.stage.device
        self.train_rows, self.eval_rows = train_rows_of(choice, model), eval_rows_of(choice)
        self.captured = choice.captured(model)
        self._micro_batch = MicroBatch(self.stage)

    def load(self) -> Moment:
        """Weights, adapter, embedding and head."""
        Loading(self.stage).run()
        return self.device.end()

    def evaluation(self) -> Moment:
        """One micro-batch without gradients. Captured micro-steps have given their memory back before it."""
        self.device.now = "before the first layer"
        self._forget_capture()
        self._micro_batch.drop_keys()
        self.device.begin()
        self._micro_batch.evaluate(self.eval_rows)
        return self.device.end()

    def training(self) -> Moment:
        """Two optimizer steps: in the first the moments come, in the second they are there.

        Where micro-steps are captured the first is launched, and the second is the capture; then the same again, as
        after an evaluation or where another shape comes: what cuBLAS took in a capture outlives it, so that the second
        needs more than the first."""
        device = self.device
        device.now = "before the first layer"
        device.begin()
        self._make_gradients()
        for _ in range(CAPTURES if self.captured else 1):
            self._forget_capture()
            self._micro_batch.train(self.train_rows)
            self._update()
            if self.captured:
                self._graph_inputs(self.train_rows)
                device.begin_capture()
            self._micro_batch.train(self.train_rows)
            device.end_capture()
            self._update()
        return device.end()

    def checkpoint(self) -> Moment:
        """The adapter is copied to the host: nothing more on the device."""
        self.device.now = "copying the adapter"
        self.device.begin()
        return self.device.end()

    def _make_gradients(self) -> None:
        """One run of zeros for all trained tensors, which stays (model/layer/adapter.py, `zero_gradients`)."""
        if self.choice.adapter == "device":
            count = sum(sum(trained) for trained in self.stage.trained)
            self.device.take("adapter gradients", ("gradients",), count * TRAINED_BYTES)

    def _forget_capture(self) -> None:
        """Captured micro-steps give their memory back."""
        if self.device.has(("graph batch",)):
            self.device.give(("graph batch",))
            self.device.forget_capture()

    def _graph_inputs(self, rows: Rows) -> None:
        """What a captured micro-step reads: its own copy of the batch."""
        size = (24 + (4 if self.choice.dropout else 0)) * rows.tokens + 4 * (rows.borders + 1)
        self.device.take("captured micro-step: its batch", ("graph batch",), size)

    def _update(self) -> None:
        """AdamW: two moments for each trained number, and a step count for each tensor."""
        if self.choice.adapter == "host":
            return
        self.device.now = "the optimizer's step"
        for i, trained in enumerate(self.stage.trained):
            for j, count in enumerate(trained):
                if self.device.has(("moment", i, j, 0)):
                    return
                self.device.take("small tensors", ("count", i, j), 4)
                blocks = moment_blocks(self.choice.optim, count) * MOMENTS
                for k, size in enumerate(blocks):
                    self.device.take("optimizer moments", ("moment", i, j, k), size)
