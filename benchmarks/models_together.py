"""Trains many small models at once on one GPU, for experiments that compare hundreds of them.

A small model leaves a GPU idle while Python launches its kernels, and processes that share a GPU take turns on it. Here
the whole step of each model is a CUDA graph, and each model has a stream of its own, so that the GPU runs the kernels
of many models side by side and Python launches one graph per step and model.

A step is that of :func:`btlm.train.train`: its model, loss, parameter groups, clipping, AdamW and schedule. On a CPU
the same steps run without graphs, one after another.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from byte_stream import ByteStream, token_bytes

from btlm.data.loader import TokenLoader
from btlm.train import Recipe
from btlm.train.distributed import Ranks
from btlm.train.held_out import evaluate_held_out
from btlm.train.model import prepare_model
from btlm.train.step import LossModel


def train_together(recipes: Sequence[Recipe], stream: ByteStream, device: torch.device) -> list[float]:
    """Train a model by each recipe; returns its held-out loss in nats per byte, infinite where it diverged.

    Args:
        recipes: Recipes of one stage and of one number of steps, whose micro-batch is the whole batch.
        stream: Text to train on and to evaluate on.
        device: A CUDA device, or a CPU.
    """
    batches = {seed: _batches(recipe, stream).to(device) for seed, recipe in {r.seed: r for r in recipes}.items()}
    models = [_Model(recipe, batches[recipe.seed], device) for recipe in recipes]
    for model in models:
        model.capture()
    for _ in range(recipes[0].total_steps):
        for model in models:
            model.run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return [model.held_out_loss(stream) for model in models]


def _batches(recipe: Recipe, stream: ByteStream) -> torch.Tensor:
    """All batches of a run, uint16 as int32 ``[steps, rows, length]``."""
    loader = TokenLoader(stream, recipe.stages, seed=recipe.seed)  # type: ignore[arg-type]
    return torch.from_numpy(np.stack([batch.input_ids.astype(np.int32) for batch in loader]))


class _Model:
    """A model, its optimizer and its place in the batches; after ``capture``, ``run`` takes the next step."""

    def __init__(self, recipe: Recipe, batches: torch.Tensor, device: torch.device) -> None:
        trainee = prepare_model(recipe)
        self._recipe, self._batches, self._device = recipe, batches, device
        self._model = LossModel(trainee.network, getattr(torch, recipe.precision.dtype)).to(device).train()
        options = recipe.optimizer
        groups = trainee.parameter_groups(options.lr, options.weight_decay)
        self._peaks = [group["lr"] for group in groups]
        self._on_gpu = device.type == "cuda"
        for group in groups if self._on_gpu else []:
            group["lr"] = torch.tensor(group["lr"], device=device)  # The graph reads it there.
        self._optimizer = torch.optim.AdamW(
            groups, betas=options.betas, eps=options.eps, fused=True, capturable=self._on_gpu
        )
        (stage,) = recipe.stages
        factors = [recipe.lr_factor((step + 1) * stage.batch_tokens) for step in range(recipe.total_steps)]
        # One factor more, 0, for the steps before the capture, which must not change the weights.
        self._factors = torch.tensor([*factors, 0.0], dtype=torch.float64, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._valid = batches[0].shape[0] * (batches[0].shape[1] - 1)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None

    def capture(self) -> None:
        """Make the graph of a step, on a GPU; the weights and the optimizer stay as they are."""
        if not self._on_gpu:
            return
        self._stream = torch.cuda.Stream(self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                self._step.fill_(len(self._factors) - 1)
                self._take_step()
            for state in self._optimizer.state.values():
                for value in state.values():
                    value.zero_()
            self._step.zero_()
            self._finite.fill_(True)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._take_step()

    def run(self) -> None:
        """Take the next step; on a GPU, after those before it in this model's stream."""
        if self._graph is None or self._stream is None:
            self._take_step()
            return
        with torch.cuda.stream(self._stream):
            self._graph.replay()

    def held_out_loss(self, stream: ByteStream) -> float:
        """Mean loss over the sources in nats per byte; infinite if a step was not finite."""
        if not bool(self._finite):
            return math.inf
        (stage,), tokens = self._recipe.stages, self._recipe.evaluation.tokens_per_source
        rows = max(1, self._recipe.micro_batch_tokens // stage.sequence_length)
        ranks = Ranks(self._device)
        losses = evaluate_held_out(
            self._model,
            stream,  # type: ignore[arg-type]
            stage.sequence_length,
            tokens,
            token_bytes(),
            ranks,
            rows,
        )
        loss = losses["bits_per_byte"]["mean"] * math.log(2)
        return loss if math.isfinite(loss) else math.inf

    def _take_step(self) -> None:
        factor = self._factors.index_select(0, self._step)[0]
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            if self._on_gpu:
                group["lr"].copy_(factor * peak)
            else:
                group["lr"] = peak * float(factor)
        place = self._step.clamp(max=len(self._batches) - 1)
        loss = self._model(self._batches.index_select(0, place)[0].long()) / self._valid
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._recipe.optimizer.clip_norm)
        self._finite &= torch.isfinite(loss.detach()) & torch.isfinite(norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._step += 1
