"""``explain``: what ``fuse`` did to a model, or would do."""

from typing import NamedTuple

from torch import nn

from . import adapters, checks
from .fused_module import FusedModule
from .modules import class_path


class Row(NamedTuple):
    """One block or stem: its name in the model, its class, and whether it is fused.

    reason: None for a block that is fused, or will be by ``fuse``; for one that is fused, why it
    runs as the plain block for now.
    """

    name: str
    kind: str
    fused: bool
    reason: str | None

    @property
    def status(self) -> str:
        """The row's last column."""
        if self.fused:
            return "fused" if self.reason is None else f"fused, runs composed: {self.reason}"
        return "can be fused" if self.reason is None else f"declined: {self.reason}"


class Report(list[Row]):
    """The rows of a model, which print as a table."""

    def __str__(self) -> str:
        if not self:
            return "no bottleneck blocks"
        head = ("block", "class", "")
        table = [head, *((row.name or "(the model)", row.kind, row.status) for row in self)]
        widths = [max(len(line[i]) for line in table) for i in range(2)]
        lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in table]
        return "\n".join([*lines, self.summary()])

    __repr__ = __str__

    def ready(self) -> int:
        """How many can be fused and are not yet."""
        return sum(not row.fused and row.reason is None for row in self)

    def summary(self) -> str:
        """How many there are of each."""
        fused, ready = sum(row.fused for row in self), self.ready()
        return f"{fused} fused, {ready} can be fused, {len(self) - fused - ready} declined"


def explain(model: nn.Module, *, stem: bool = False) -> Report:
    """The bottleneck blocks of a model, with the reason for each that is not fused.

    Changes nothing. The rows print as a table: ``print(explain(model))``. Whether an input or a
    device keeps a block from running fused is not asked; ``block.why_not_fused(x)`` tells.

    Args:
        model: any module.
        stem: list also what ``fuse(model, stem=True)`` looks at; what it fused is listed anyway.

    Raises:
        TypeError: model is not a module.
    """
    checks.raise_if(checks.module(model))
    rows = Report()
    stems = [finding for finding in adapters.survey_stems(model) if stem or finding.fused]
    for finding in [*stems, *adapters.survey(model)]:
        module = finding.module
        kind = module.plain_class if isinstance(module, FusedModule) else type(module)
        reason = finding.reason or checks.disabled()
        rows.append(Row(finding.name, class_path(kind), finding.fused, reason))
    return rows
