"""An update of a small model without a word between host and device, so that a CUDA graph can hold all of it.

A model of two layers is some three hundred launches a step and none of them is long: a GPU waits for the host most of the time. Shapes are
the same at every step, so forward pass, backward pass, clipping and optimizer are captured once and replayed. Learning rate and loss are on
the device. On a CPU, and where capturing fails, the same function is called each time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gdn.experiments.definition import Training
from gdn.experiments.inputs import Inputs
from gdn.experiments.readout import Model
from gdn.train.step import autocast, gradient_norm

WARM = 3
"""Updates of a shape before it is captured: kernels are compiled and chosen in them, and the optimizer makes its state."""

Capture = Callable[[Callable[[], None]], Callable[[], Any]]
"""Turns a call into its replay."""


class Update:
    """Updates a model.

    Args:
        model: what learns.
        training: optimizer, clipping and precision.
        capture: how an update is captured. None: not at all.
    """

    def __init__(self, model: Model, training: Training, capture: Capture | None = None) -> None:
        self.model, self.training = model, training
        self.optimizer = training.optim.build(model)
        self.capture = capture if isinstance(self.optimizer, torch.optim.AdamW) else None
        self.rate = torch.zeros((), device=model.device)
        if self.capture is not None:
            for group in self.optimizer.param_groups:
                group["lr"], group["capturable"] = self.rate, True
        self.losses = torch.zeros(training.steps, device=model.device)
        """The loss of each step so far, on the device."""
        self.loss = torch.zeros((), device=model.device)
        self.seen: dict[Any, int] = {}
        self.captured: dict[Any, tuple[Inputs, Callable[[], Any]]] = {}
        self.replayed = 0
        """Steps that were replays."""
        self.refused = ""
        """Why capturing failed, if it did."""

    def __call__(self, step: int, inputs: Inputs) -> None:
        """Update number `step`, from 1."""
        self._set_rate(self.training.optim.lr * self.training.schedule.factor(step - 1, self.training.steps))
        shape = inputs.shape
        if shape not in self.captured and self.capture is not None and self.seen.get(shape, 0) >= WARM:
            self._capture(inputs)
        if shape in self.captured:
            held, replay = self.captured[shape]
            for into, x in zip(held, inputs):
                if into is not None and x is not None:
                    into.copy_(x)
            replay()
            self.replayed += 1
        else:
            self.seen[shape] = self.seen.get(shape, 0) + 1
            self.compute(inputs)
        self.losses[step - 1].copy_(self.loss)

    def compute(self, inputs: Inputs) -> None:
        """One update. Reads nothing back."""
        with autocast(self.model.device, self.training.precision):
            loss = self.model(inputs.tokens, targets=inputs.targets, places=inputs.places).loss
        loss.backward()
        gradient_norm(self.model, self.training.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.copy_(loss.detach())

    def _set_rate(self, rate: float) -> None:
        self.rate.fill_(rate)
        if self.capture is None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate

    def _capture(self, inputs: Inputs) -> None:
        assert self.capture is not None
        held = inputs.each(torch.clone)
        try:
            self.captured[inputs.shape] = held, self.capture(lambda: self.compute(held))
        except RuntimeError as failure:
            self.refused = str(failure).strip().splitlines()[0]
            # Nothing ran while it was being captured: parameters and optimizer are as before.
            self.optimizer.zero_grad(set_to_none=True)
            self.seen[inputs.shape] = -self.training.steps


def cuda_graph(call: Callable[[], None]) -> Callable[[], Any]:
    """The call as a CUDA graph on the current stream, which must not be the default one."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return graph.replay


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A stream for the body, on a GPU: what is captured must have been warmed up on the stream where it is captured."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)
