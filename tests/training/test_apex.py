"""Which apex: an apex-shaped FusedAdam that is there, that is not, that fails to import; and the PyPI project of that name."""

import sys

import pytest
import torch

from pikv_ds.adapters.deepspeed import train_adam
from pikv_ds.launch.commands.report import optional_rows
from pikv_ds.training.apex import find_apex, is_nvidias
from pikv_ds.training.engine import Optimizing

SHAPED = """
import torch
class FusedAdam(torch.optim.AdamW):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0,
                 amsgrad=False, set_grad_none=True):
        assert adam_w_mode and bias_correction
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
"""
FAILS = "raise ImportError('libcudart.so.11.0: cannot open shared object file')"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Put an apex on the path: of NVIDIA's layout with that text, or None: the other project's."""

    def put(fused_adam: str | None) -> None:
        folder = tmp_path / "apex"
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        if fused_adam is not None:
            (folder / "optimizers").mkdir()
            (folder / "optimizers" / "__init__.py").write_text("from .fused_adam import FusedAdam")
            (folder / "optimizers" / "fused_adam.py").write_text(fused_adam)
        monkeypatch.syspath_prepend(tmp_path)

    yield put
    for name in [name for name in sys.modules if name == "apex" or name.startswith("apex.")]:
        del sys.modules[name]


def adam() -> train_adam.Adam:
    return train_adam.adam_of(Optimizing(steps=4, lr=0.1, weight_decay=0.01), "cuda")


def stepped(make) -> torch.Tensor:
    weight = torch.nn.Parameter(torch.arange(4.0))
    optimizer = make([weight])
    for _ in range(3):
        weight.grad = weight.detach().square() - 1
        optimizer.step()
    return weight.detach()


@pytest.fixture(autouse=True)
def _nothing_of_deepspeeds(monkeypatch):
    monkeypatch.setattr(train_adam, "is_built", lambda builder: False)


def test_present_it_moves_the_weights_as_torchs(installed):
    installed(SHAPED)
    assert is_nvidias() and find_apex().optimizer.__module__ == "apex.optimizers.fused_adam"
    found = adam()
    assert found.said.startswith("FusedAdam of apex; FusedAdam of DeepSpeed is not built")
    expected = stepped(lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.01))
    assert torch.equal(stepped(found.make), expected) and not torch.equal(expected, torch.arange(4.0))


@pytest.mark.parametrize(
    "text, said",
    [
        (FAILS, "apex fails to import (ImportError: libcudart.so.11.0"),
        ("import no_such_extension", "apex fails to import (ModuleNotFoundError: No module named 'no_such_extension')"),
        (None, "the installed apex is the PyPI project of that name, not NVIDIA's"),
    ],
)
def test_what_cannot_be_used_is_said(installed, text, said):
    installed(text)
    found = adam()
    assert found.said.startswith("torch AdamW; ") and said in found.said
    assert type(found.make([torch.nn.Parameter(torch.ones(1))])) is torch.optim.AdamW


def test_absent():
    assert is_nvidias() is None
    assert adam().said.endswith("apex is not installed")


@pytest.mark.parametrize("text, said", [(SHAPED, "NVIDIA's"), (FAILS, "NVIDIA's"), (None, "the PyPI project of that name")])
def test_the_report_names_it_without_importing_it(installed, text, said):
    installed(text)
    row = next(row for row in optional_rows() if row["package"] == "apex")
    assert said in row["found"] and "apex" not in sys.modules


def test_on_the_cpu_apex_is_not_asked(installed):
    installed(SHAPED)
    assert "apex" not in train_adam.adam_of(Optimizing(steps=1), "cpu").said
