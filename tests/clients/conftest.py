"""The two models that every client gets: an exported folder, and a stock model of the same size and tokenizer.

With the environment variable CLIENTS_FOLDER, an exported folder, nothing of this project is imported.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM


def export(out: Path) -> None:
    """Export random weights of a small model, with a tokenizer, as `convert to-torch` does."""
    from convert.to_torch import write_model
    from jaxllm.config import ModelConfig
    from jaxllm.config.groups import DataConfig
    from jaxllm.data.sources import open_source
    from jaxllm.data.tokenizer import export_tokenizer, train_tokenizer
    from parity_tests.forward import random_weights

    text = out.parent / "text.txt"
    text.write_text("\n".join(f"def f{i}(x):\n    return x + {i * i}\n" for i in range(500)))
    tokenizer = train_tokenizer(open_source(DataConfig(source=str(text)), 0), 300)
    eos = tokenizer.eos_token_id
    config = ModelConfig(
        vocab_size=len(tokenizer) + 9,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        moe_intermediate_size=32,
        max_position_embeddings=128,
        final_norm=True,
        dropout=0.0,
        initializer_range=0.1,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
    )
    write_model(config, random_weights(config), out, "float32")
    export_tokenizer(tokenizer, config, out)


def make_control(exported: Path, out: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    D, H = config["hidden_size"], config["num_attention_heads"]
    stock = DeepseekV3Config(
        **{name: config[name] for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "moe_intermediate_size",
            "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "max_position_embeddings",
            "bos_token_id", "eos_token_id", "pad_token_id",
        )},
        num_key_value_heads=H,
        intermediate_size=config["moe_intermediate_size"],
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        q_lora_rank=D // config["compression_ratio"],
        kv_lora_rank=D // config["compression_ratio"],
        qk_rope_head_dim=D // H // 2,
        qk_nope_head_dim=D // H // 2,
        v_head_dim=D // H,
        initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(stock).save_pretrained(out)
    for file in exported.glob("*token*"):
        shutil.copy(file, out)


@pytest.fixture(autouse=True)
def _one_thread():
    """The models are small: threads that wait for each other cost more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("clients")
    if "CLIENTS_FOLDER" in os.environ:
        ours = Path(os.environ["CLIENTS_FOLDER"])
    else:
        ours = made / "ours"
        export(ours)
    make_control(ours, made / "control")
    return {"ours": ours, "control": made / "control"}


class Client:
    """One of the two sides, as a client loads it."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self.is_ours = name == "ours"
        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

    def load(self, auto=AutoModelForCausalLM, **options):
        options = {"attn_implementation": "eager"} | options
        return auto.from_pretrained(self.folder, trust_remote_code=True, **options).eval()

    def skip_before(self, release: str, reason: str) -> None:
        if Version(transformers.__version__) < Version(release):
            pytest.skip(f"transformers before {release}: {reason}")

    def ids(self, *shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(5, self.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))

    def padded(self, rows: int = 3, length: int = 24) -> dict[str, torch.Tensor]:
        """Rows with 0, 3, 6, ... tokens of padding on the left."""
        mask = torch.ones(rows, length, dtype=torch.long)
        for i in range(rows):
            mask[i, : 3 * i] = 0
        return {"input_ids": self.ids(rows, length), "attention_mask": mask}


@pytest.fixture(params=["ours", "control"], scope="session")
def client(request, folders) -> Client:
    return Client(request.param, folders[request.param])


@pytest.fixture(scope="session")
def ours(folders) -> Client:
    return Client("ours", folders["ours"])
