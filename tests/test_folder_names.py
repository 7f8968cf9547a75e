"""Any name that the file system accepts is good for a run: trained, resumed, generated from, converted both ways."""

from __future__ import annotations

import os
import shutil
import string
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint._src.serialization import ocdbt_utils

import train
from convert import __main__ as convert
from jaxllm import CustomLLM, ModelConfig, UserError
from jaxllm import generate as generation
from jaxllm.model.decoder import split_model
from jaxllm.store.checkpoint import Weights, load_weights
from jaxllm.store.checkpoint_writer import write_run
from jaxllm.store.checksums import checkpoint_context, find_damage, write_checksums
from jaxllm.store.resume import choose_checkpoint

PRINTABLE = string.printable.replace("/", "")
NOT_UTF_8 = os.fsdecode(b"\xff\xfe\x80")

MODEL = ModelConfig(
    vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, moe_intermediate_size=8,
    n_routed_experts=2, num_experts_per_tok=1, max_position_embeddings=16,
)  # fmt: skip


def use(folder: Path, arguments: tuple[str, ...], capsys) -> None:
    """Every command on a run in `folder`, each with exit code 0; what was trained is what is read."""
    start = [*arguments, "--eval-every", "20", "--save-every", "20", "--run-dir", str(folder)]
    assert train.main([*start, "--steps", "20"]) == 0
    assert train.main([*start, "--steps", "21"]) == 0
    assert "Resuming from step 20" in capsys.readouterr().out
    assert choose_checkpoint(folder) == (21, [])
    said = []
    exported, back = folder.parent / f"{folder.name}.torch", folder.parent / f"{folder.name}.back"
    assert convert.main(["to-torch", str(folder), str(exported)]) == 0
    assert convert.main(["to-flax", str(exported), str(back)]) == 0
    capsys.readouterr()
    for source in (folder, exported, back):
        assert generation.main([str(source), "--prompt", "def ", "--max-new-tokens", "5", "--greedy"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0].startswith("def ")
    assert said == said[:1] * 3


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(f"{PRINTABLE}/{NOT_UTF_8}", id="all-printable-and-bytes"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("[r]", "-r *?", "a b/~", "x" * 200, "λόγος 訓練 🙂", "r\n", f"{NOT_UTF_8}[")
        ),
    ],
)
def test_every_command_accepts_any_folder_name(name, narrow, tmp_path, capsys):
    use(tmp_path / name, narrow, capsys)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights(*jax.jit(lambda: split_model(CustomLLM(MODEL, rngs=nnx.Rngs(0)))[1:])())


OTHERS = [f"x{char}{char}" for char in PRINTABLE if not char.isalnum()]


@pytest.mark.parametrize(
    "name",
    [*OTHERS[::4], *(pytest.param(x, marks=pytest.mark.slow) for x in OTHERS if x not in OTHERS[::4]), NOT_UTF_8],
)
def test_weights_written_under_any_name_are_read(name, weights, tmp_path):
    write_run(tmp_path / name / "r", MODEL, weights)
    config, read = load_weights(tmp_path / name / "r")
    assert config == MODEL
    jax.tree.map(np.testing.assert_array_equal, read, weights)


def test_a_checkpoint_that_cannot_be_read_gets_no_name(weights, tmp_path, monkeypatch):
    """Orbax leaves out the merge of an item, as it did for paths with wildcards: the save fails, in one line."""

    async def nothing(*args, **kwargs) -> None:
        pass

    with monkeypatch.context() as patch:
        patch.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", nothing)
        with pytest.raises(UserError, match=r"checkpoints/0 cannot be written \(.*free space") as error:
            write_run(tmp_path / "r", MODEL, weights)
    assert "\n" not in str(error.value)
    assert choose_checkpoint(tmp_path / "r") == (None, [])


def test_a_checkpoint_that_was_never_merged_is_damaged(run, tmp_path):
    """As earlier versions wrote it, with right checksums; the one before it is used."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    newest = folder / "checkpoints" / "20"
    (newest / "training" / "manifest.ocdbt").unlink()
    write_checksums(newest, checkpoint_context(folder))
    assert find_damage(newest) == "training/manifest.ocdbt was never written"
    assert choose_checkpoint(folder) == (10, [20])
