from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, RetentionPolicy, Seen


@POLICIES.register("snapkv")
class ObservationWindow(RetentionPolicy):
    """Keep what the latest `window` queries attend to, and what lies beside it.

    w <- w max(0, 1 - n / window) + sum over the last min(n, window) queries of the share of attention in the page, for n new queries:
        after a prompt of at least `window` tokens, exactly what its last `window` queries saw; later queries push these out.
    score(page) = mean of w over `kernel` tokens around the page (so many pages of the same shard, odd); the window's own pages count as 0.
    Give recent_tokens of the "scheduling" block the same length as `window`. Costs 4 bytes per page.

    Source: Li et al., SnapKV, arXiv 2404.14469, section 4 (prompt only, per token and head there; all queries, per page here).
    """

    page_values: ClassVar[dict[str, torch.dtype]] = {"window": torch.float32}

    def __init__(self, *, window: int = 64, kernel: int = 5) -> None:
        if window < 1 or kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"window >= 1 and an odd kernel >= 1, got window {window} and kernel {kernel}")
        self.window, self.kernel = window, kernel

    def observe(self, values: dict[str, Tensor], seen: Seen) -> None:
        fades = (1 - seen.asked.sum(1) / self.window).clamp_min(0)
        values["window"].mul_(fades).add_(seen.share.sum(1))

    def score(self, pages: Pages) -> Tensor:
        before_window = pages.last_position < (pages.lens - self.window)[:, None, None]
        value = torch.where(before_window, pages.value("window"), 0)
        kernel = self.kernel // pages.page_size | 1
        if kernel == 1:
            return value
        return F.avg_pool1d(value.flatten(0, 1).unsqueeze(1), kernel, stride=1, padding=kernel // 2).view_as(value)
