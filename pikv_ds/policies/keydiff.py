from torch import Tensor
from torch.nn import functional as F

from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, TokenPolicy


@POLICIES.register("keydiff")
class KeyDifference(TokenPolicy):
    """Keep entries whose keys point elsewhere than the others: they hold what nothing else does, whatever will be asked.

    score(entry) = -cos(k, anchor), anchor = mean of k / ||k|| over the request's entries, mean over kv heads; a page has the mean of its
    entries. Keys are after RoPE. With several shards each has its own anchor, so that no message is needed. Looks at no query: what is
    asked after eviction is found as well as what was asked before. Reads the keys back at each eviction, costs no memory.
    Source: Park et al., KeyDiff, arXiv 2504.15364, section 3; kvpress KeyDiffPress.
    """

    def entry_scores(self, pages: Pages) -> Tensor:
        k = F.normalize(pages.keys, dim=-1)  # [R, S, C, Hkv, page_size, Dk], 0 where no entry is
        count = pages.entries.sum(-1).clamp_min(1)[:, :, None, None, None, None]
        anchor = k.sum((2, 4), keepdim=True) / count
        return -F.cosine_similarity(k, anchor, dim=-1).mean(3)
