"""What is recorded of a model is what its attention computes."""

import torch

from pikv_ds.adapters.hf.anatomy import find_attentions
from pikv_ds.adapters.hf.record import Recorder
from pikv_ds.bundled import load

TOKENS = 48


def test_a_window_gives_the_layers_outputs():
    """softmax(scale q k) v through o_proj is the module's output, and q, k, v are those of the recorded hidden state."""
    model, _ = load()
    ids = torch.randint(0, 2000, (3, TOKENS), generator=torch.Generator().manual_seed(0))
    outputs = {}
    attentions = find_attentions(model)
    hooks = [a.register_forward_hook(lambda a, _, out, i=i: outputs.__setitem__(i, out[0][0])) for i, a in enumerate(attentions)]
    window = Recorder(model, ids)[1]
    for hook in hooks:
        hook.remove()
    assert torch.equal(window.ids, ids[1]) and not window.question.any() and len(window.layers) == len(attentions)
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    for i, (attention, layer) in enumerate(zip(attentions, window.layers, strict=True)):
        q, k, v = (x.transpose(0, 1) for x in (layer.q, layer.k, layer.v))
        k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
        weights = (layer.scale * q @ k.transpose(1, 2)).masked_fill(~causal, -torch.inf).softmax(-1)
        with torch.no_grad():
            out = attention.o_proj((weights @ v).transpose(0, 1).flatten(1))
            values = attention.v_proj(layer.hidden)
        torch.testing.assert_close(out, outputs[i], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(values, layer.v.flatten(1), atol=1e-5, rtol=1e-4)


def test_windows_are_the_same_when_they_are_recorded_again():
    model, _ = load()
    ids = torch.randint(0, 2000, (3, TOKENS), generator=torch.Generator().manual_seed(0))
    question = torch.zeros(3, TOKENS, dtype=torch.bool)
    question[:, -5:] = True
    all_kept, one_kept = Recorder(model, ids, question), Recorder(model, ids, question, keep_bytes=0)
    first = [one_kept[i] for i in (0, 1, 0)]
    assert first[0] is not first[2] and all_kept[0] is all_kept[0]
    for one, other in zip(first[0].layers, first[2].layers, strict=True):
        assert torch.equal(one.q, other.q) and torch.equal(one.hidden, other.hidden)
    assert first[0].question.sum() == 5
    assert model.config._attn_implementation != "pikv_calibrate"
