from __future__ import annotations

import torch
from torch import Tensor, nn

from pikv_ds.errors import ConfigError, TrainingError
from pikv_ds.policies.entry_scorer import EntryScorer, page_scores
from pikv_ds.training.part import LearnedPart
from pikv_ds.training.parts import PARTS
from pikv_ds.training.recorded import ModelFacts, Window
from pikv_ds.training.rehearsal import page_peaks

FLOOR = 1e-6  # of a share, before its logarithm


@PARTS.register("eviction_scorer")
class EvictionScorerPart(LearnedPart):
    """Scores of entries from their keys and values, regressed on what the model looks at when it repeats the window.

    loss = mean over layers, kv heads and pages of (log sum of the entries' exp(score) - log of the page's largest share)^2. The objective
    is the part of these shares that the best `ratio` of the pages by score holds, over what the best by share hold; heads of a layer
    compete. Layers with a sliding window are not evicted from and not trained.
    """

    serves = "scheduling.method = learned_scores"
    wants_questions = True
    repeats = True

    def __init__(self, *, page_size: int = 8, hidden: int = 32, ratio: float = 0.25) -> None:
        """page_size: of the pages that are fitted; the scores of entries serve any. ratio: of the objective."""
        if page_size < 1 or hidden < 1 or not 0 < ratio < 1:
            raise ValueError(f"legal are page_size and hidden >= 1 and a ratio between 0 and 1, got {page_size}, {hidden}, {ratio}")
        self.page_size, self.hidden, self.ratio = page_size, hidden, ratio
        self._targets: dict[bytes, dict[int, Tensor]] = {}  # by tokens: they cost more than a step

    def options(self) -> dict[str, object]:
        return {"page_size": self.page_size, "hidden": self.hidden, "ratio": self.ratio}

    def build(self, facts: ModelFacts) -> nn.Module:
        if all(spec.window is not None for spec in facts.layers):
            raise ConfigError(f"part {self.name!r} on a model whose layers all have a sliding window: nothing is evicted from these")
        return EntryScorer(facts.trained_layers, self.hidden)

    def loss(self, module: nn.Module, window: Window, generator: torch.Generator) -> dict[str, Tensor]:
        errors = [(said - peak.clamp_min(FLOOR).log()).square().mean() for said, peak in self.scored(module, window)]
        return {"loss": torch.stack(errors).mean()}

    def held_out(self, module: nn.Module, window: Window) -> dict[str, Tensor]:
        held, alike = [], []
        for said, peak in self.scored(module, window):
            best, own = int(max(1, self.ratio * peak.numel())), said.flatten()
            held.append(peak.flatten()[own.topk(best).indices].sum() / peak.flatten().topk(best).values.sum())
            alike.append(torch.corrcoef(torch.stack([own, peak.flatten().clamp_min(FLOOR).log()]))[0, 1])
        return {"objective": torch.stack(held).mean(), "correlation": torch.stack(alike).mean()}

    def scored(self, module: nn.Module, window: Window) -> list[tuple[Tensor, Tensor]]:
        """Of each layer with full attention: log shares as the module says them and shares as they are, [H, C] each."""
        read = int((~window.question).sum())
        if read == len(window.ids):
            raise TrainingError(f"{self.name!r} learns from what is read again, and no token of this window is: mark it as a question")
        first = int(window.ids.sum()) % self.page_size  # where pages begin differs between windows, as texts do
        count = (read - first) // self.page_size
        found = []
        for i, peak in self._peaks(window, first, count).items():
            layer = window.layers[i]
            k, v = (x[first : first + count * self.page_size].transpose(0, 1).float() for x in (layer.k, layer.v))
            found.append((page_scores(module(i, k, v).unflatten(-1, (count, self.page_size))), peak))
        return found

    def _peaks(self, window: Window, first: int, count: int) -> dict[int, Tensor]:
        key = window.ids.cpu().numpy().tobytes()
        if key not in self._targets:
            asking = window.question.nonzero().squeeze(-1)
            full = [(i, layer) for i, layer in enumerate(window.layers) if layer.window is None]
            self._targets[key] = {i: page_peaks(layer, asking, first, count, self.page_size) for i, layer in full}
        return self._targets[key]
