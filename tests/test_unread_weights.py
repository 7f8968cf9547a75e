"""Folders whose weights are not the model that transformers loads, or no numbers: refused by whatever reads them."""

from __future__ import annotations

import numpy as np
import pytest

import train
from convert.to_flax import from_pretrained, import_run
from jaxllm import UserError
from jaxllm.store.folder import read_model_config
from tests.test_families import folder_of, tensors_of, write_tensors


@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_an_adapter_beside_the_weights_is_not_passed_over(file, tmp_path):
    folder = folder_of(tmp_path / "model")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for read in (from_pretrained, lambda source: import_run(source, tmp_path / "run")):
        with pytest.raises(UserError, match=r"adapter_config\.json: .*\.merge_and_unload\(\)\.save_pretrained\(OUT\)"):
            read(folder / file)
    assert not (tmp_path / "run").exists()
    (folder / "adapter_config.json").unlink()
    from_pretrained(folder / file)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused_by_each_reader(value, tmp_path):
    folder = folder_of(tmp_path / "model")
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = np.array(tensors["lm_head.weight"])
    tensors["lm_head.weight"][1, 2] = value
    write_tensors(folder, tensors)
    for read in (from_pretrained, lambda source: import_run(source, tmp_path / "run")):
        with pytest.raises(
            UserError, match=rf"^{folder}: lm_head\.weight has values that are not finite: name weights"
        ):
            read(folder)
    config = train.TrainConfig.from_options(
        init=folder, seq_len=32, run_dir=tmp_path / "run", model=read_model_config(folder)
    )
    with pytest.raises(UserError, match="not finite"):
        train.read_start(config, None)
    assert not (tmp_path / "run").exists()
