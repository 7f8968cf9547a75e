"""Folders whose weights are not the model that transformers loads, or no numbers: refused by whatever reads them."""

from __future__ import annotations

import pytest

from convert.to_flax import from_pretrained, import_run
from jaxllm import UserError
from tests.test_families import folder_of


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
