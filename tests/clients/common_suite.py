"""transformers' own tests of a model, on the model in the folder CLIENTS_SIDE; run by test_common.py.

They are in the package `common`: the `tests` of transformers' source distribution.
"""

from __future__ import annotations

import os
import unittest

import torch
from common.test_modeling_common import ModelTesterMixin
from common.test_training_mixin import TrainingTesterMixin
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto

FOLDER = os.environ["CLIENTS_SIDE"]
CONFIG = AutoConfig.from_pretrained(FOLDER, trust_remote_code=True)
AUTO = {
    AutoModel: modeling_auto.MODEL_MAPPING_NAMES,
    AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    AutoModelForSequenceClassification: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForTokenClassification: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}
CLASSES = [type(auto.from_config(CONFIG, trust_remote_code=True)) for auto in AUTO]
if type(CONFIG).__module__.startswith("transformers_modules."):  # the tests look for a model's classes there
    AutoConfig.register(CONFIG.model_type, type(CONFIG))
    for (auto, names), model in zip(AUTO.items(), CLASSES, strict=True):
        auto.register(type(CONFIG), model)
        names[CONFIG.model_type] = model.__name__
SIZES = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "moe_intermediate_size": 16,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "max_position_embeddings": 128,
    "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
OURS = {"compression_ratio": 4, "final_norm": True, "dropout": 0.0}
STOCK = {
    "num_key_value_heads": 4, "intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip


class ModelTester:
    """A small config and a batch, by the names for which the tests look."""

    batch_size, seq_length, is_training = 3, 9, True
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4
    base_model_class, causal_lm_class = CLASSES[:2]

    def get_config(self):
        return type(CONFIG)(**SIZES, **(STOCK if CONFIG.model_type == "deepseek_v3" else OURS))

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, SIZES["vocab_size"], (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


class CommonTest(ModelTesterMixin, TrainingTesterMixin, unittest.TestCase):
    all_model_classes = CLASSES
    test_all_params_have_gradient = False  # an expert may get no token
    test_can_init_all_missing_weights_before_2023 = True  # the file of an exported folder names no year
    test_generation_tester_mixin_inheritance = None  # the source distribution lacks the tests of generation

    def setUp(self):
        torch.set_num_threads(1)
        self.model_tester = ModelTester()
