"""ds.json of a fit: honoured, completed, or refused by the name of the key."""

import json

import pytest

from pikv_ds.adapters.deepspeed.train_config import is_offloaded, read, stage_of
from pikv_ds.errors import ConfigError
from pikv_ds.training.engine import Optimizing

OPTIMIZING = Optimizing(steps=10, lr=0.003, clip=0.7)


def test_what_the_user_wrote_stays(tmp_path):
    given = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}, "gradient_clipping": 0.2, "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}, "train_batch_size": 2, "train_micro_batch_size_per_gpu": 1,
    }  # fmt: skip
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(given))
    found = read(str(file), OPTIMIZING, 2)
    assert {key: found.part[key] for key in given if key != "train_batch_size"} == {
        k: v for k, v in given.items() if k != "train_batch_size"
    }
    assert found.base is None and stage_of(found.part) == 2


def test_what_is_missing_is_filled_in():
    part = read(None, OPTIMIZING, 2).part
    assert stage_of(part) == 1 and part["gradient_clipping"] == 0.7 and part["train_micro_batch_size_per_gpu"] == 1
    assert read({"zero_optimization": {"stage": 3}}, OPTIMIZING, 2, lr_given=True).base is None


def test_experts_are_of_the_base():
    block = {"enabled": True, "autoep_size": 2}
    found = read({"expert_parallel": block, "zero_optimization": {"stage": 3}, "bf16": {"enabled": False}}, OPTIMIZING, 2)
    assert "expert_parallel" not in found.part and stage_of(found.part) == 3
    assert found.base["expert_parallel"] == block and stage_of(found.base) == 3
    assert stage_of(read({"expert_parallel": block, "zero_optimization": {"stage": 1}}, OPTIMIZING, 2).base) == 0
    assert read({"expert_parallel": {**block, "enabled": False}}, OPTIMIZING, 2).base is None


@pytest.mark.parametrize(
    "given, offloaded",
    [
        ({}, False),
        ({"offload_optimizer": {"device": "cpu"}}, True),
        ({"offload_optimizer": {"device": "none"}}, False),
        ({"cpu_offload": True}, True),
    ],
)
def test_offload_is_seen(given, offloaded):
    assert is_offloaded({"zero_optimization": {"stage": 2, **given}}) is offloaded


@pytest.mark.parametrize(
    "given, said",
    [
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps = 4: a rank trains on one window"),
        ({"train_micro_batch_size_per_gpu": 2}, "train_micro_batch_size_per_gpu = 2"),
        ({"train_batch_size": 8}, r"train_batch_size = 8 on 2 rank\(s\)"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size = 2: a part's loss sees whole windows"),
        ({"pikv": {"page_size": 8}}, "'pikv': nothing is decoded"),
        ({"fp16": {"enabled": True}}, 'use "bf16"'),
        ({"activation_checkpointing": {"partition_activations": True}}, "'activation_checkpointing'"),
        ({"hybrid_engine": {"enabled": True}}, "'hybrid_engine'"),
        ({"tensor_parallel": {"autotp_size": 2}}, "autotp_size > 1"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, "--lr 0.003 beside optimizer.params.lr = 0.1"),
    ],
)
def test_what_contradicts_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        read(given, OPTIMIZING, 2, lr_given=True)


def test_the_rate_of_the_file_is_taken_unless_one_is_asked_for():
    given = {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
    assert read(given, OPTIMIZING, 1).part["optimizer"] == given["optimizer"]
    assert read({"optimizer": {"type": "AdamW", "params": {"lr": 0.003}}}, OPTIMIZING, 1, lr_given=True)
