"""Checks of user masks: padding on either side, holes, and a whole column in a decode step; and masks that are refused."""

import torch
from megatron.core.inference.contexts import StaticInferenceContext

from pikv_ds.errors import UnsupportedError
from pikv_ds.megatron_patch import PiKVInferenceContext, disable_pikv, enable_pikv
from pikv_ds.megatron_patch.context import all_logits
from tests.dist.jobs.report import Report
from tests.megatron.models import causal_mask, positions, tiny_config, tiny_model, tokens
from tests.megatron.runs import assert_conserved, dense_is_forbidden, refused

PIECES = [9, 5, 1, 1, 1, 1, -2, 1, 3]  # columns of each forward; a negative number takes some back


def padding(rows: int, columns: int, *, in_decode: bool = True) -> torch.Tensor:
    """[rows, columns] bool: the second row on the left; the third on the right of its prompt, in a whole piece, and in a decode step."""
    hidden = torch.zeros(rows, columns, dtype=torch.bool)
    hidden[1, :3] = hidden[2, 4:14] = True
    hidden[2, 15] = in_decode
    return hidden


def mask_of(hidden: torch.Tensor, start: int, end: int) -> torch.Tensor:
    return causal_mask(end - start, start) | hidden[:, None, None, :end]


def run(model, context, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of the tokens that are no padding, [tokens, V]; after the crop the second row is continued twice."""
    context.reset()
    all_logits(context)
    kept, start = [], 0
    for columns in PIECES:
        context.increment_sequence_len_offset(min(columns, 0))
        if columns < 0:
            context.swap_key_value_dict(torch.tensor([1, 1, 2]))
            start, hidden = start + columns, hidden[[1, 1, 2]]
            continue
        end = start + columns
        part = ids[:, start:end]
        out = model(part, positions(part, start), mask_of(hidden, start, end), inference_context=context, runtime_gather_output=True)
        context.increment_sequence_len_offset(columns)
        kept.append(out[~hidden[:, start:end]])
        start = end
    return torch.cat(kept)


def check_masks(report: Report, ids: torch.Tensor) -> None:
    rows, columns = ids.shape
    model = tiny_model(tiny_config())
    for name, own, source in (
        ("padding, ids previous_layer", ids, "previous_layer"),
        ("padding, ids true", ids, "true"),
        ("padding, the same requests", tokens(rows, columns, seed=4), "previous_layer"),
    ):
        # A decode step in which one rank has a row without a token, and the others have not.
        hidden = padding(rows, columns, in_decode=report.rank == 0 or own is not ids)
        with torch.no_grad():
            reference = run(model, StaticInferenceContext(rows, columns), own, hidden)
        with report.check(name) as row, torch.no_grad(), dense_is_forbidden():
            enable_pikv(model, {"page_size": 2, "storage": {"expert_ids": source}})
            context = PiKVInferenceContext(rows, columns, model=model)
            row["difference"] = (run(model, context, own, hidden) - reference).abs().max().item()
            assert row["difference"] <= 1e-5, row
            assert_conserved(context, len(model.decoder.layers) * int((~hidden[[1, 1, 2], : context.columns]).sum()))
            disable_pikv(model)
    with report.check("masks refused"), torch.no_grad():
        enable_pikv(model)
        context = PiKVInferenceContext(rows, columns, model=model)

        def call(end: int, mask: torch.Tensor | None) -> None:
            start = context.sequence_len_offset
            part = ids[:, start:end]
            model(part, positions(part, start), mask, inference_context=context, runtime_gather_output=True)

        two_documents = causal_mask(9).clone()
        two_documents[..., 5:, :5] = True
        ahead = causal_mask(9).clone()
        ahead[..., 0, 4] = False
        for mask in (two_documents, ahead):
            refused(UnsupportedError, "hides other tokens", lambda mask=mask: call(9, mask))
        refused(UnsupportedError, "attention_mask is torch.bool (1, 1, 8, 8)", lambda: call(9, causal_mask(8)))
        refused(UnsupportedError, "attention_mask is torch.float32", lambda: call(9, causal_mask(9).float()))
        call(9, mask_of(padding(rows, columns), 0, 9))
        context.increment_sequence_len_offset(9)
        refused(UnsupportedError, "attention_mask is None after a forward in which columns were padding", lambda: call(10, None))
        refused(UnsupportedError, "shows what was padding", lambda: call(10, causal_mask(1, 9)))
        windowed = enable_pikv(tiny_model(tiny_config(window_size=(5, 0))))
        model, context = windowed, PiKVInferenceContext(rows, columns, model=windowed)
        refused(UnsupportedError, "sliding window", lambda: call(9, mask_of(padding(rows, columns), 0, 9)))
