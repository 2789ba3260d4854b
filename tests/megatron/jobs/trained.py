"""A checkpoint of Megatron's own training: loaded and evaluated. Arguments: folder, [save LAYOUT], LAYOUT...

A layout is tp,ep,etp,pp. The one after `save` trains and saves; the others load what was saved, and evaluate it where there are
no stages; short form: the first of them.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pikv_ds.bundled import evaluation_text, model_path
from pikv_ds.launch.cli import build_parser
from pikv_ds.launch.evaluation.job import measure_unit, open_backend, prose_of
from pikv_ds.launch.evaluation.plan import read_spec
from pikv_ds.launch.evaluation.ppl import windows_of
from pikv_ds.launch.evaluation.spec import scored_queries
from pikv_ds.megatron_patch import cpu_compat
from pikv_ds.megatron_patch.args_config import read_architecture
from pikv_ds.megatron_patch.checkpoint import load_checkpoint
from pikv_ds.megatron_patch.checkpoint_folder import checkpoint_args
from tests.dist.jobs.report import Report
from tests.long_form import LONG
from tests.megatron import megatron_lm
from tests.megatron.models import start
from tests.megatron.runs import full_forward

ITERATION, STEPS, CONTEXT = 40, 6, 96
TEXT = evaluation_text()[:40_000]


def batches(steps: int) -> list[torch.Tensor]:
    """Of the text that is evaluated: a few steps show in its perplexity. Each data-parallel rank has its own."""
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(model_path())(TEXT)["input_ids"])
    shift = 64 * 4 * steps * parallel_state.get_data_parallel_rank()
    return list(ids[shift : shift + 64 * 4 * steps].view(steps, 4, 64))


def save(report: Report, folder: Path, layout: str) -> None:
    start(*map(int, layout.split(",")))
    with report.check("trained and saved") as row:
        model, optimizer = megatron_lm.build(megatron_lm.arguments()).eval(), None
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:  # stages would need Megatron's schedule
            optimizer, losses = megatron_lm.train(model, batches(STEPS))
            row["losses"] = losses
            assert losses[-1] < losses[0] - 0.5, row
        weights = megatron_lm.save(model, folder, megatron_lm.arguments(), ITERATION, optimizer)
        assert weights.name == "iter_0000040"
    ids = torch.randint(3, megatron_lm.VOCAB, (2, 40), generator=torch.Generator().manual_seed(5))
    logits = full_forward(model, ids)
    if dist.get_rank() == 0:
        torch.save((ids, logits), folder / "logits.pt")
    end()


def end() -> None:
    dist.barrier()
    parallel_state.destroy_model_parallel()


def check_layout(report: Report, folder: Path, layout: str) -> None:
    start(*map(int, layout.split(",")))
    ids, reference = torch.load(folder / "logits.pt")
    alone = megatron_lm.build(checkpoint_args(folder))
    megatron_lm.load(alone, folder / "iter_0000040")
    with report.check(f"{layout} loads") as row:
        model = read_architecture(checkpoint_args(folder)).build(**cpu_compat.cpu_config_options()).eval()
        load_checkpoint(model, folder)
        assert model.state_dict().keys() == alone.state_dict().keys()
        assert all(torch.equal(own, other) for own, other in zip(model.parameters(), alone.parameters(), strict=True))
        logits = full_forward(model, ids)
        row["difference"] = (logits - reference).abs().max().item()
        assert torch.equal(logits, full_forward(alone, ids)) and row["difference"] <= 1e-4, row
    end()


def check_evaluation(report: Report, folder: Path, layout: str) -> None:
    """`pikv eval` beside a full forward of Megatron's own load."""
    tp, ep, etp, pp = map(int, layout.split(","))
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    words = [
        "--load",
        str(folder),
        "--tokenizer",
        str(model_path()),
        "--text",
        str(folder / "text.txt"),
        "--context",
        str(CONTEXT),
        "--samples",
        "2",
        "--chunk",
        "4",
    ]
    layout_words = ["--ranks", str(dist.get_world_size()), "--tp", str(tp), "--ep", str(ep)]
    spec, units = read_spec(build_parser().parse_args(["eval", "--backend", "megatron", "--tasks", "ppl", *words, *layout_words]))
    with report.check(f"{layout} is evaluated") as row, torch.no_grad():
        with open_backend(spec, units) as backend:
            prose = prose_of(backend, spec)
            rows = [measure_unit(backend, spec, prose, unit, lambda done: None) for unit in units]
            windows = windows_of(spec, prose, backend.data_rank)
        start(tp, ep, etp)
        cpu_compat.install()
        alone = megatron_lm.build(checkpoint_args(folder))
        megatron_lm.load(alone, folder / "iter_0000040")
        log_probs = full_forward(alone, windows).log_softmax(-1)[:, scored_queries(CONTEXT)]
        targets = windows[:, [query + 1 for query in scored_queries(CONTEXT)]]
        row["alone"] = (-log_probs.gather(-1, targets.unsqueeze(-1)).double().mean()).exp().item()
        row["dense"], row["pikv"] = (one["ppl"] for one in rows)
        assert [one["method"] for one in rows] == ["dense", "exact"]
        assert abs(row["pikv"] / row["alone"] - 1) < 1e-5 and abs(row["dense"] / row["alone"] - 1) < 1e-5, row
        assert row["alone"] < 0.7 * megatron_lm.VOCAB, row
        assert abs(rows[1]["kl"]) < 1e-6, rows[1]
    end()


def main() -> None:
    report = Report()
    cpu_compat.install()
    dist.init_process_group("gloo")
    folder, what = Path(sys.argv[1]), sys.argv[2:]
    if what[0] == "save":
        save(report, folder, what[1])
        what = what[2:]
    evaluated = [layout for layout in what if layout.endswith(",1")][: None if LONG else 1]
    for layout in what:
        check_layout(report, folder, layout)
        if layout in evaluated:
            check_evaluation(report, folder, layout)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
