"""What rotates a codec, joins two or chooses by layer loses nothing of theirs, also what they are given later."""

from dataclasses import dataclass, fields, replace

import pytest
import torch

from pikv_ds.codecs import CODECS
from pikv_ds.codecs.base import Codec, Heads, PoolSpec
from pikv_ds.codecs.int8 import Int8
from pikv_ds.codecs.lora import LoRA
from pikv_ds.codecs.none import NoCodec
from pikv_ds.codecs.rotated import rotated
from pikv_ds.codecs.split import split
from pikv_ds.codecs.table import CodecTable, Coded, Sides
from pikv_ds.errors import ConfigError
from pikv_ds.spec import LayerSpec
from tests.calibrations import random_calibration

SPEC = LayerSpec(layer_idx=1, num_kv_heads=2, k_dim=32, v_dim=32)
OTHER = replace(SPEC, layer_idx=0)
LATENT = LayerSpec(layer_idx=1, num_kv_heads=1, k_dim=40, v_dim=32, latent=True)
DTYPE = torch.float32


@dataclass(frozen=True, kw_only=True, eq=False)
class Dated(PoolSpec):
    """A pool with something that no pool of the package has."""

    year: int


class Vintage(NoCodec):
    """A codec with an attribute that no codec of the package has, and a pool that tells it."""

    name = "vintage"

    def __init__(self, year: int) -> None:
        self.year = year

    def pool(self, spec, page_size, dtype):
        own = super().pool(spec, page_size, dtype)
        return Dated(year=self.year, **{field.name: getattr(own, field.name) for field in fields(own)})

    def request_bytes(self, spec):
        return self.year


def pool_of(codec: Codec, spec=SPEC) -> PoolSpec:
    return codec.pool(spec, 64, DTYPE)


def table(k: Codec, v: Codec | None = None, seed: int | None = None, **layers: Codec) -> CodecTable:
    def sides(k: Codec, v: Codec | None = None) -> Sides:
        own = Coded(k, seed)
        return Sides(own, own if v is None else Coded(v, seed))

    return CodecTable(sides(k, v), {int(name[1:]): sides(codec) for name, codec in layers.items()})


def test_what_a_codec_gains_is_seen_through_a_rotation():
    pool = rotated(pool_of(Vintage(1961)), 3)
    assert pool.maps is not None and (pool.year, pool.codec.year, pool.request_bytes) == (1961, 1961, 1961)


def test_what_a_codec_gains_is_seen_through_a_split():
    """On the side that it is of, rotated or not."""
    keys, values = pool_of(Vintage(1961)), rotated(pool_of(Vintage(1970)), 0)
    pool = rotated(split(keys, values), 5)
    assert (pool.year, pool.codec.year, pool.values.year, pool.values.codec.year) == (1961, 1961, 1970, 1970)
    assert pool.request_bytes == 1961 + 1970
    pool = split(pool_of(Int8()), values)
    assert pool.values.year == 1970 and pool.codec.group == 64 and not hasattr(pool, "year")


def test_what_a_codec_gains_is_seen_by_layer():
    of_all = table(Vintage(1961), Vintage(1970), seed=1, L0=Vintage(1982))
    inner, outer = (of_all.pool(spec, 64, DTYPE) for spec in (SPEC, OTHER))
    assert (inner.year, inner.values.year, outer.year, outer.values) == (1961, 1970, 1982, None)
    assert [codec.year for sides in (of_all.of(SPEC), of_all.of(OTHER)) for codec in sides.codecs] == [1961, 1970, 1982]


def test_every_field_is_kept_but_for_what_a_rotation_is():
    """The list says what rotating changes: a field of PoolSpec that is added is not in it, and must stay."""
    codec = LoRA.on(random_calibration([OTHER, SPEC]), rank=16)
    before, changed = pool_of(codec), {"transform", "rounding"}
    after = rotated(before, 0)
    for field in fields(before):
        assert (getattr(after, field.name) is getattr(before, field.name)) == (field.name not in changed), field.name
    fitted = pool_of(CODECS.build("svd", rank=16))
    turned = rotated(fitted, 0)
    assert turned.maps is None is fitted.fitted.rotation and turned.fitted.tokens == fitted.fitted.tokens == 1024
    assert [x.shape for x in turned.fitted.rotation] == [(2, 16, 16)] * 2


@pytest.mark.parametrize("seed", [None, 0], ids=["plain", "rotated"])
@pytest.mark.parametrize("name", CODECS.names())
def test_a_pool_is_what_its_codec_says(name, seed):
    """Alone for all layers, by a rotation only the maps and their rounding differ."""
    codec = CODECS.get(name).example([Heads(torch.randn(64, 4, 32), torch.randn(64, 2, 32), torch.randn(64, 2, 32)) for _ in range(2)])
    of_all = table(codec, seed=seed)
    pool, page_size = of_all.pool(SPEC, 64, DTYPE), codec.page_size(None)
    assert pool.fmt == codec.page_format(SPEC, 64, DTYPE) and pool.stored == codec.stored(SPEC)
    assert (of_all.name, of_all.page_size(None), of_all.only, of_all.calibrated) == (codec.name, page_size, codec, codec.calibrated)
    assert (of_all.per_request, of_all.light) == (codec.per_request, codec.light) and (pool.fitted is None) == (not codec.per_request)
    assert (pool.light is None) == (codec.light is None) and (pool.maps is codec.transform(SPEC)) == (seed is None or codec.per_request)
    more = 0 if seed is None else torch.finfo(DTYPE).eps + 2.0**-20
    assert pool.declared_errors == tuple(error + more for error in codec.declared_errors(SPEC, 64, DTYPE))
    if pool.light is not None:
        assert pool.light.fmt == codec.light.page_format(SPEC, 64, DTYPE) and pool.light.maps is pool.maps


def test_keys_and_values_apart():
    low, coded = LoRA.on(random_calibration([OTHER, SPEC]), rank=16), Int8()
    pool = table(coded, low).pool(SPEC, 64, DTYPE)
    assert (pool.fmt.name, pool.fmt.v_name, pool.fmt.k_dim, pool.fmt.v_dim) == ("int8", "fp32", 32, 16)
    assert (pool.stored.k_dim, pool.stored.v_dim) == (32, 16) and torch.equal(pool.maps.k.encode[0], torch.eye(32))
    assert pool.maps.v is low.transform(SPEC).v and pool.light is None and pool.fitted is None
    assert pool.declared_errors == (coded.declared_errors(SPEC, 64, DTYPE)[0], low.declared_errors(SPEC, 64, DTYPE)[1])
    turned = split(pool_of(coded), rotated(pool_of(low), 0))
    assert turned.declared_errors[0] == pool.declared_errors[0] and turned.declared_errors[1] > pool.declared_errors[1]


def test_a_codec_of_one_side_needs_no_record_for_the_other():
    """Values of 12 columns and pages of 16 tokens suit neither codec by itself."""
    narrow = replace(SPEC, v_dim=12)
    low = LoRA.on(random_calibration([replace(OTHER, v_dim=12), narrow]), rank=8)
    pool = table(NoCodec(), low).pool(narrow, 16, DTYPE)
    assert (pool.fmt.k_dim, pool.fmt.v_dim) == (32, 8)
    with pytest.raises(ValueError, match="v_dim must be a multiple of 8"):
        pool_of(NoCodec(), narrow).fmt  # noqa: B018
    assert table(NoCodec(), Int8()).pool(SPEC, 16, DTYPE).fmt.label == "fp32/int8"
    with pytest.raises(ValueError, match="page_size 16 is not a multiple"):
        Int8().pool(SPEC, 16, DTYPE).fmt  # noqa: B018


def test_a_latent_has_one_codec():
    low = LoRA.on(random_calibration([OTHER, SPEC]), rank=8)
    for of_all in (table(NoCodec(), Int8()), table(low, Int8())):
        with pytest.raises(ValueError, match="keys, so pikv.compression.k and .v can't differ"):
            of_all.pool(LATENT, 64, DTYPE)
    with pytest.raises(ValueError, match="can't differ"):
        split(pool_of(NoCodec(), LATENT), pool_of(Int8(), LATENT))


def test_pages_suit_all():
    assert table(NoCodec(), Int8(group=96)).page_size(None) == 96 == table(NoCodec(), L0=Int8(group=96)).page_size(None)
    assert table(Int8(group=64), L0=Int8(group=96)).page_size(None) == 192
    assert table(NoCodec(), Int8()).page_size(16) == 16  # values share no scales over tokens
    for of_all in (table(Int8(), NoCodec()), table(NoCodec(), L0=Int8())):
        with pytest.raises(ValueError, match="a multiple of 64 with pikv.compression.method = 'int8'"):
            of_all.page_size(16)


def test_several_codecs_are_no_one_codec():
    svd, light = CODECS.build("svd", rank=16), CODECS.build("adaptive")
    for of_all in (table(svd, NoCodec()), table(light, L0=NoCodec()), table(NoCodec(), L0=svd), table(NoCodec(), light)):
        assert of_all.only is None is of_all.light and not of_all.per_request
    low = LoRA.on(random_calibration([OTHER, SPEC]), rank=16)
    assert [x.calibrated for x in (table(NoCodec(), low), table(NoCodec(), L0=low), table(NoCodec(), Int8()))] == [True, True, False]
    assert [x.name for x in (table(Int8(), low), table(Int8(), Int8()), table(low, L0=Int8()))] == ["int8 + lora", "int8", "lora"]


def test_calibrations_of_both_sides_and_of_a_layer_are_checked():
    norms = [torch.rand(2, 32) + 1 for _ in range(2)]
    right, wrong = (LoRA.on(random_calibration([OTHER, SPEC], own), rank=16) for own in (norms, [x + 1 for x in norms]))
    table(right, right).check_model(SPEC, norms[1])
    table(right, L0=wrong).check_model(SPEC, norms[1])
    for of_all in (table(wrong, right), table(right, wrong), table(right, L1=wrong)):
        with pytest.raises(ConfigError, match="was made with other weights"):
            of_all.check_model(SPEC, norms[1])
