"""Saved sessions: what was saved goes on bit for bit, and a file that is not what it was, or not of this cache, is refused by name."""

import json
import os
import stat
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import pikv_ds
from pikv_ds.errors import SessionError, UnsupportedError
from pikv_ds.ops import PageFormat
from pikv_ds.policies import POLICIES
from pikv_ds.routers import ROUTERS
from pikv_ds.sessions import file
from pikv_ds.sessions.unused import cleared
from tests.long_form import short_or_long
from tests.retention_blocks import needed
from tests.routing_blocks import placement, routing
from tests.sessions.test_turns import EXACT, LAST_BITS, OTHERS, generate
from tests.tiny_models import fingerprint, prompt, tiny_model


@cache
def known() -> list[torch.Tensor]:
    return fingerprint(tiny_model("qwen3_moe"))


def policy_block(name: str, folder: Path) -> dict:
    own = {} if name == "none" else {"budget_tokens": 24, "sink_tokens": 2, "recent_tokens": 6}
    return {"page_size": 4, "scheduling": {"method": name, **own, **needed(name, folder, layers=2, heads=2, width=32, fingerprint=known())}}


def router_block(name: str, folder: Path) -> dict:
    block = routing(name, folder, layers=2, shards=2, query_width=64, fingerprint=known())
    return {"page_size": 4, "routing": block, "storage": {"num_shards": 2, **placement(name)}}


CASES = {name: lambda folder, block=block: block for name, block in {"exact": EXACT, **OTHERS}.items()}
CASES |= {f"policy {name}": lambda folder, name=name: policy_block(name, folder) for name in POLICIES.names()}
CASES |= {f"router {name}": lambda folder, name=name: router_block(name, folder) for name in ROUTERS.names()}
SHORT = ["exact", "int8", "int4 behind a raw window", "policy h2o", "policy duo_heads", "router bounds", "router centroids"]


@torch.no_grad()
@pytest.mark.parametrize("name", short_or_long(SHORT, list(CASES)))
def test_what_was_saved_goes_on(name, tmp_path):
    model, block = tiny_model("qwen3_moe"), CASES[name](tmp_path)
    path = tmp_path / "anna.safetensors"
    with pikv_ds.attach(model, block) as cache:
        session = cache.session("anna")
        said, _ = generate(model, prompt(90, seed=1), session)
        size = session.save(path)
        assert size == path.stat().st_size and stat.S_IMODE(path.stat().st_mode) == 0o600
        turn = torch.cat([said, prompt(7, seed=2)], 1)
        expected = generate(model, turn, session, max_new_tokens=20)
    with pikv_ds.attach(model, block) as cache:
        generate(model, prompt(50, seed=9))
        session = cache.session("anna")
        generate(model, prompt(30, seed=8), session)  # what it held goes
        session.load(path)
        assert session.tokens == said[:, :-1].tolist()
        got = generate(model, turn, session, max_new_tokens=20)
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], **LAST_BITS)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_families(family, tmp_path):
    model = tiny_model(family)
    with pikv_ds.attach(model, EXACT) as cache:
        session = cache.session("anna")
        said, _ = generate(model, prompt(40, seed=1), session)
        session.save(tmp_path / "anna")
        turn = torch.cat([said, prompt(7, seed=2)], 1)
        expected = generate(model, turn, session)
        other = cache.new_cache()  # any cache can be saved and loaded, a session checks its tokens as well
        other.load(tmp_path / "anna")
        got = generate(model, turn, other)
        torch.testing.assert_close(got[1], expected[1], **LAST_BITS)


@torch.no_grad()
def test_a_padded_batch(tmp_path):
    model, ids = tiny_model("qwen3_moe"), prompt(20, seed=1, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    config = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 5}
    with pikv_ds.attach(model, EXACT) as cache:
        one, two = cache.new_cache(), cache.new_cache()
        said = model.generate(ids, attention_mask=mask, past_key_values=one, **config)
        one.save(tmp_path / "two rows")
        two.load(tmp_path / "two rows")
        mask = torch.nn.functional.pad(mask, (0, said.shape[1] - 20), value=1)
        got = [model.generate(said, attention_mask=mask, past_key_values=cache, **config).tolist() for cache in (one, two)]
    assert got[0] == got[1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["exact", "int8"])
def test_equal_rows_give_equal_bytes_and_nothing_of_others(name, tmp_path):
    """The second cache has had other requests in its pages, which are not given back and not in the order of the tables."""
    model, ids, block = tiny_model("qwen3_moe"), prompt(43, seed=1), EXACT if name == "exact" else OTHERS[name]
    with pikv_ds.attach(model, block) as attached:
        for which in ("clean", "used"):
            cache = attached.new_cache()
            if which == "used":
                model(prompt(150, seed=7, batch=3), past_key_values=cache)
                cache.select_rows([2])
                cache.crop(-110)
                model(prompt(3, seed=8), past_key_values=cache)
                cache.crop(-43)
            model(ids[:, :42], past_key_values=cache)
            model(ids[:, 42:], past_key_values=cache)
            cache.save(tmp_path / which)
    (clean, about), (used, other) = (file.read(tmp_path / which) for which in ("clean", "used"))
    assert about["rows"]["lens"] == other["rows"]["lens"] == [43] and clean.keys() == used.keys()
    assert [key for key in clean if not torch.equal(clean[key], used[key])] == []
    assert (tmp_path / "clean").read_bytes() == (tmp_path / "used").read_bytes()


def test_bytes_that_no_entry_has_are_cleared():
    for name, kwargs in (("fp32", {}), ("int8", {}), ("int4", {"v_name": "int2"}), ("fp8_e4m3", {}), ("fp4_e2m1", {}), ("bf16", {})):
        fmt = PageFormat(name, 2, 32, 32, 64, **kwargs)
        records = torch.full((3, fmt.record_bytes), 255, dtype=torch.uint8)
        none, some, full = cleared(records, torch.tensor([0, 33, 64]), fmt)
        assert not none.any()
        section = 2 * fmt.head.end
        assert some[section : section + 4 * 33].all() and not some[section + 4 * 33 :].any(), "positions"
        assert some[: fmt.k_row_bytes * 33].all() == (not fmt.grouped)
        assert not some[fmt.k_row_bytes * 33 : fmt.k_row_bytes * 64].any()
        assert full[: fmt.k_row_bytes * 64].all() and full[section : section + 256].all()
        v = fmt.head.v
        assert some[v : v + fmt.v_row_bytes * 33].all() and not some[v + fmt.v_row_bytes * 33 : v + fmt.v_row_bytes * 64].any()


# ---- refused ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "anna"
    model = tiny_model("qwen3_moe")
    with torch.no_grad(), pikv_ds.attach(model, EXACT) as cache:
        session = cache.session("anna")
        generate(model, prompt(40, seed=1), session)
        session.save(path)
    return path


def refused(path, match: str, model=None, block=EXACT, error=SessionError):
    """What was in the cache is still there."""
    model = model or tiny_model("qwen3_moe")
    with torch.no_grad(), pikv_ds.attach(model, block) as cache:
        session = cache.session("anna")
        said, _ = generate(model, prompt(12, seed=3), session)
        with pytest.raises(error, match=match):
            session.load(path)
        assert session.tokens == said[:, :-1].tolist()
        generate(model, torch.cat([said, prompt(3, seed=4)], 1), session)


def test_a_flipped_bit_anywhere(saved, tmp_path):
    whole = saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(header, len(whole), (8,), generator=generator).tolist() + [header, len(whole) - 1]
    for at in places:
        bad = bytearray(whole)
        bad[at] ^= 1 << at % 8
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(SessionError, match="checksum differs"):
            file.read(tmp_path / "bad")
    refused(tmp_path / "bad", "checksum differs")
    for at in torch.randint(8, header, (40,), generator=generator).tolist():  # names, shapes, what is said of them
        bad = bytearray(whole)
        bad[at] ^= 1
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(SessionError):
            file.read(tmp_path / "bad")


@pytest.mark.parametrize("part", [0, 7, 500, 0.5, -1])
def test_a_file_that_was_cut_short(part, saved, tmp_path):
    whole = saved.read_bytes()
    (tmp_path / "short").write_bytes(whole[: int(part * len(whole)) if isinstance(part, float) else part])
    refused(tmp_path / "short", "cut short|can't be read")


def test_no_file_and_one_of_another_kind(tmp_path):
    from safetensors.torch import save_file

    refused(tmp_path / "nowhere", "can't be read")
    save_file({"x": torch.zeros(3)}, tmp_path / "weights")
    refused(tmp_path / "weights", "has format None")
    (tmp_path / "text").write_text("hello, I am no session at all")
    refused(tmp_path / "text", "no session")


def test_another_model(saved):
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3] += 0.5
    refused(saved, "another model: the key projection of layer 1", model)


def test_other_weights_beside_the_keys(saved):
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[3] += 0.5
    refused(saved, "other weights", model)
    refused(saved, "layer 0 = |experts = ", tiny_model("mixtral"))


@pytest.mark.parametrize(
    "block, match",
    [
        ({"compression": {"method": "fp8_e4m3"}, "page_size": 4}, "compression.method = 'none'.*'fp8_e4m3'"),
        ({"page_size": 8}, "page_size = 4.*8"),
        ({"page_size": 4, "storage": {"num_shards": 4}}, "has 2 shards per layer, this cache 4: set"),
        (
            {"page_size": 4, "scheduling": {"method": "streaming_llm", "budget_tokens": 24, "sink_tokens": 2, "recent_tokens": 6}},
            "scheduling",
        ),
        ({"page_size": 4, "routing": {"method": "bounds", "budget_pages": 4, "sink_tokens": 2, "recent_tokens": 5}}, "routing.method"),
    ],
)
def test_another_cache(block, match, saved):
    block = {**block, "storage": {"num_shards": 2, **block.get("storage", {})}}
    refused(saved, match, block=block)


def test_another_version(saved, tmp_path):
    whole = saved.read_bytes()
    (tmp_path / "later").write_bytes(whole.replace(b"pikv session 1", b"pikv session 9", 1))
    refused(tmp_path / "later", "has format 'pikv session 9'")


@torch.no_grad()
def test_what_has_no_copy(tmp_path):
    model = tiny_model("qwen3_moe")
    with pikv_ds.attach(model, EXACT) as cache:
        with pytest.raises(UnsupportedError, match="run the prompt first"):
            cache.session("anna").save(tmp_path / "empty")
        session = cache.session("bert")
        generate(model, prompt(9, seed=1), session)
        session.batch_repeat_interleave(2)
        with pytest.raises(UnsupportedError, match="rows were selected"):
            session.save(tmp_path / "moved")
    with pikv_ds.attach(model, {"compression": {"method": "svd", "rank": 8}}) as cache:
        session = cache.session("anna")
        generate(model, prompt(9, seed=1), session)
        with pytest.raises(UnsupportedError, match="fits a basis to each request"):
            session.save(tmp_path / "svd")
    with pikv_ds.attach(model, {"offload": {"device_gib": 1, "host_gib": 1}}) as cache:
        session = cache.session("anna")
        generate(model, prompt(9, seed=1), session)
        with pytest.raises(UnsupportedError, match="lie in slower tiers"):
            session.save(tmp_path / "tiers")
    assert not list(tmp_path.iterdir())
    model = tiny_model("qwen3_next")
    with pikv_ds.attach(model, {}) as cache:
        session = cache.session("anna")
        model.generate(prompt(9, seed=1), past_key_values=session, max_new_tokens=2, do_sample=False)
        with pytest.raises(UnsupportedError, match="recurrence"):
            session.fork("bert")
        assert cache.sessions == ["anna"]


@torch.no_grad()
def test_a_write_that_fails_leaves_the_earlier_file(saved, tmp_path, monkeypatch):
    model, path = tiny_model("qwen3_moe"), tmp_path / "anna"
    path.write_bytes(saved.read_bytes())

    def full(*args):
        raise OSError(28, "No space left on device")

    with pikv_ds.attach(model, EXACT) as cache:
        session = cache.session("anna")
        session.load(path)
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(SessionError, match="No space left"):
            session.save(path)
        monkeypatch.undo()
    assert path.read_bytes() == saved.read_bytes() and [p.name for p in tmp_path.iterdir()] == ["anna"]


@torch.no_grad()
def test_prefixes_are_saved_and_found_again(tmp_path):
    model = tiny_model("qwen3_moe")
    block = {"page_size": 4, "storage": {"num_shards": 2, "prefix": {"enabled": True, "budget_tokens": 400}}}
    system = prompt(48, seed=1)
    asked = [torch.cat([system, prompt(6, seed=n)], 1) for n in range(2, 6)]
    expected = [generate(model, ids) for ids in asked]
    with pikv_ds.attach(model, block) as cache:
        for ids in asked[:3]:
            generate(model, ids)
        generate(model, prompt(40, seed=33))
        assert cache.stats()["rows_parked"] == 3
        cache.save(tmp_path / "prefixes")
    with pikv_ds.attach(model, block) as cache:
        cache.load(tmp_path / "prefixes")
        got = generate(model, asked[3])
        assert got[0].tolist() == expected[3][0].tolist()
        torch.testing.assert_close(got[1], expected[3][1], rtol=0, atol=2e-5)
        assert cache.stats()["prefix_tokens_reused"] == 48
        got = generate(model, asked[1])
        assert got[0].tolist() == expected[1][0].tolist()
        stats = cache.stats()
        assert stats["prefix_tokens_reused"] == 48 + 53 and stats["rows_parked"] > 1
        gone = stats["entries_cropped"]
        assert stats["entries_live"] + gone == stats["entries_loaded"] + stats["entries_appended"] + stats["entries_forked"]
    refused(tmp_path / "prefixes", "parked rows")


def test_the_file_is_one_that_others_read(saved):
    with safe_open(saved, "pt") as read:
        about = json.loads(json.loads(read.metadata()["pikv"])["about"])
        names = set(read.keys())
    assert about["num_shards"] == 2 and about["rows"]["lens"] == [45]
    assert {f"shard {layer} 0 {shard} records" for layer in range(2) for shard in range(2)} <= names
    assert {"host tokens", "host norms 0", "homes", "evicted"} <= names
