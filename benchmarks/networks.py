"""Whole ResNets of plain or of fused blocks, and a training step of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import MEMORY_FORMATS, new_block
from benchmarks.shapes import NETWORKS
from fused_bottleneck import Bottleneck
from fused_bottleneck.fused_module import FusedModule

CLASSES = 1000
# Branches start small, as usual (Goyal et al. 2017 start them at zero). With branches of full size
# a fresh network is chaotic: in bfloat16 its gradients in two layouts have nothing in common, and
# nothing could be checked. With zero most gradients would be zero.
RESIDUAL_SCALE = 0.1


class ResNet(nn.Module):
    """Stem, four stages of bottlenecks, average pooling and a classifier (He et al. 2015, v1.5).

    Args:
        block: the class of its blocks.
        name: one of ``NETWORKS``.

    Shapes: images ``[N, 3, H, W]`` to logits ``[N, 1000]``.
    """

    def __init__(self, block: type[Bottleneck], name: str) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        shapes = NETWORKS[name]
        self.blocks = nn.Sequential(
            *(new_block(block, shape, False) for shape in shapes for _ in range(shape.count))
        )
        self.fc = nn.Linear(shapes[-1].out_channels, CLASSES)
        for norm in (module.bn3 for module in self.blocks if isinstance(module, Bottleneck)):
            nn.init.constant_(norm.weight, RESIDUAL_SCALE)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(images)).mean((2, 3)))


class TrainingStep:
    """SGD with momentum on one batch of random images that stays the same.

    Parameters are float32; a 16-bit dtype means autocast, as networks are trained.
    """

    def __init__(
        self,
        model: ResNet,
        layout: str,
        images: Tensor,
        labels: Tensor,
        dtype: torch.dtype,
    ) -> None:
        memory_format: Any = MEMORY_FORMATS[layout]
        self.model = model.to(images.device)
        # torch's annotations of Module.to leave memory_format out.
        self.model.to(memory_format=memory_format)  # type: ignore[call-overload]
        self.images = images.contiguous(memory_format=memory_format)
        self.labels = labels
        self.dtype = dtype
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True
        )
        self.network: Callable[[Tensor], Tensor] = self.model

    def _autocast(self) -> AbstractContextManager[Any]:
        enabled = self.dtype in (torch.bfloat16, torch.float16)
        dtype = self.dtype if enabled else torch.bfloat16
        return torch.autocast(self.images.device.type, dtype, enabled=enabled)

    def forward(self) -> Tensor:
        """The loss."""
        with self._autocast():
            return nn.functional.cross_entropy(self.network(self.images), self.labels)

    @torch.no_grad()
    def composed_reasons(self) -> list[str]:
        """Why fused modules would run composed, one line each; empty if all run fused.

        In eval, so that no running statistics change; what decides is the same but for them.
        """
        reasons: list[str] = []

        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(module, FusedModule)
            reason = module.why_not_fused(inputs[0])
            if reason is not None:
                reasons.append(f"a {type(module).__name__} would run unfused: {reason}")

        fused = [module for module in self.model.modules() if isinstance(module, FusedModule)]
        handles = [module.register_forward_pre_hook(note) for module in fused]
        self.model.eval()
        with self._autocast():
            self.model(self.images)
        self.model.train()
        for handle in handles:
            handle.remove()
        return reasons

    def __call__(self) -> Tensor:
        """One update; the loss before it."""
        torch.compiler.cudagraph_mark_step_begin()  # what the last step returned is done with
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class GraphedStep:
    """A training step captured as a CUDA graph."""

    WARMUP = 3  # steps on the side, after which every lazy initialisation is done

    def __init__(self, step: TrainingStep) -> None:
        self.step = step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            state = _copied(step.model.state_dict())
            for _ in range(self.WARMUP):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        # Back to the beginning, so that its losses can be compared.
        step.model.load_state_dict(state)
        for buffers in step.optimizer.state.values():
            buffers["momentum_buffer"].zero_()
        step.optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = step()

    def __call__(self) -> Tensor:
        """One update; the loss before it."""
        self._graph.replay()
        return self._loss.clone()


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}
