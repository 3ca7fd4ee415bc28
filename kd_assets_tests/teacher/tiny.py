"""Tiny teachers with random weights, shards and jobs for them, made on the spot: the real thing, only small.

Imports neither dagster nor anything of the control plane, so that these tests run on a node's environment, too.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from kd_assets.contract import (
    CACHES,
    Asset,
    EmbeddingParams,
    HiddenStateParams,
    JobFile,
    Output,
    Reporter,
    TeacherParams,
    TopkParams,
    WorkUnit,
)
from kd_assets.model_files.fingerprints import weights_fingerprint
from kd_assets.store import Documents, ResultWriter, Shard, encode_shard, part_stats, plan_output, read_shard
from kd_assets.store.writing.documents import offsets_of
from kd_assets.teacher.model.configuration import auto_class
from kd_assets.teacher.runner import TeacherRunner
from kd_assets.worker.stop_flag import StopFlag

VOCABULARY = 200
HIDDEN_SIZE = 32
N_BLOCKS = 3
RECIPE = "tiny"

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": N_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Large enough for peaked distributions: with the default of 0.02 all logits are about 0 and nothing is tested.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
_MANY_EXPERTS = {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 24}
_LATENT = {  # multi-head latent attention
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
_DEEPSEEK = {
    **_LATENT,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 2,
}
_GEMMA = {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
_GATED_DELTA = {  # linear attention with a recurrent state
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_GRANITE = {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 32,
    "deepstack_visual_indexes": [0],
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama_biased": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral": ("MistralConfig", {"sliding_window": 16, "head_dim": 8}),
    "ministral": (
        "MinistralConfig",
        {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    ),
    "mixtral": ("MixtralConfig", _EXPERTS),
    "qwen2_moe": ("Qwen2MoeConfig", {**_MANY_EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_MANY_EXPERTS, "head_dim": 8}),
    "qwen3_next": ("Qwen3NextConfig", {**_MANY_EXPERTS, **_GATED_DELTA, "shared_expert_intermediate_size": 24}),
    "qwen3_5_text": ("Qwen3_5TextConfig", _GATED_DELTA),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3TextConfig", _GEMMA),
    "gemma4_text": (
        "Gemma4TextConfig",
        {**_GEMMA, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
    ),
    "vaultgemma": ("VaultGemmaConfig", {**_GEMMA, "final_logit_softcapping": 5.0}),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {
            "head_dim": 8,
            "lru_width": 32,
            "attention_window_size": 16,
            "logits_soft_cap": 5.0,
            "w_init_variance_scale": 1.0,
        },
    ),
    "gpt2": ("GPT2Config", {}),
    "gpt_neo": ("GPTNeoConfig", {"attention_types": [[["global", "local", "global"], 1]], "window_size": 16}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gptj": ("GPTJConfig", {"rotary_dim": 4}),
    "gpt_bigcode": ("GPTBigCodeConfig", {}),
    "codegen": ("CodeGenConfig", {"rotary_dim": 4}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN_SIZE}),
    "bloom": ("BloomConfig", {}),
    "mpt": ("MptConfig", {"logit_scale": "inv_sqrt_d_model"}),
    "falcon": ("FalconConfig", {}),
    "falcon_alibi": ("FalconConfig", {"alibi": True, "new_decoder_architecture": True}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "phimoe": ("PhimoeConfig", _EXPERTS),
    "granite": ("GraniteConfig", _GRANITE),
    "granitemoe": ("GraniteMoeConfig", {**_GRANITE, **_EXPERTS}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **_GRANITE,
            **_EXPERTS,
            "shared_intermediate_size": 24,
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
    "hyperclovax": ("HyperCLOVAXConfig", {"logits_scaling": 0.25}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", {"logit_scale": 0.25, "sliding_window": 16}),
    "olmo": ("OlmoConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", {"sliding_window": 16}),
    "olmoe": ("OlmoeConfig", {**_EXPERTS, "num_experts": 4}),
    "flex_olmo": ("FlexOlmoConfig", {**_EXPERTS, "num_experts": 4}),
    "stablelm": ("StableLmConfig", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 16}),
    "glm": ("GlmConfig", {"head_dim": 8}),
    "glm4": ("Glm4Config", {"head_dim": 8}),
    "glm4_moe": ("Glm4MoeConfig", {**_DEEPSEEK, "num_key_value_heads": 2}),
    "nemotron": ("NemotronConfig", {}),
    "smollm3": ("SmolLM3Config", {}),
    "exaone4": ("Exaone4Config", {"sliding_window": 16}),
    "seed_oss": ("SeedOssConfig", {"head_dim": 8}),
    "apertus": ("ApertusConfig", {}),
    "gpt_oss": ("GptOssConfig", {**_EXPERTS, "head_dim": 8, "sliding_window": 16}),
    "llama4_text": (
        "Llama4TextConfig",
        {**_EXPERTS, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 16},
    ),
    "mllama": (
        "MllamaConfig",
        {
            "architectures": ["MllamaForConditionalGeneration"],
            "text_config": {"cross_attention_layers": []},
            "vision_config": {**_VISION, "num_global_layers": 1, "intermediate_layers_indices": [0]},
        },
    ),
    "deepseek_v2": ("DeepseekV2Config", {**_DEEPSEEK, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3Config", _DEEPSEEK),
    "minicpm3": ("MiniCPM3Config", {**_LATENT, "dim_model_base": 8}),
    "minimax": ("MiniMaxConfig", {**_EXPERTS, "head_dim": 8, "block_size": 8}),
    "dbrx": (
        "DbrxConfig",
        {
            "d_model": HIDDEN_SIZE,
            "n_heads": 4,
            "n_layers": N_BLOCKS,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": HIDDEN_SIZE},
        },
    ),
    "jamba": (
        "JambaConfig",
        {**_EXPERTS, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    ),
    "bamba": (
        "BambaConfig",
        {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8},
    ),
    "falcon_h1": (
        "FalconH1Config",
        {
            "head_dim": 8,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
            "lm_head_multiplier": 0.5,
        },
    ),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"]}),
    "mamba": ("MambaConfig", {"state_size": 8}),
    "mamba2": ("Mamba2Config", {"num_heads": 4, "head_dim": 16, "state_size": 8, "chunk_size": 8, "n_groups": 1}),
    "rwkv": ("RwkvConfig", {"attention_hidden_size": HIDDEN_SIZE}),
    "bart_decoder": ("BartConfig", {"d_model": HIDDEN_SIZE, "decoder_layers": N_BLOCKS, "decoder_ffn_dim": 48}),
    "bert_decoder": ("BertConfig", {"is_decoder": True}),
    "modernbert_decoder": ("ModernBertDecoderConfig", {"local_attention": 16}),
    "inkling_text": (
        "InklingTextConfig",
        {
            **_MANY_EXPERTS,
            "n_routed_experts": 4,
            "head_dim": 8,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "d_rel": 4,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "logits_mup_width_multiplier": 2.0,
            "unpadded_vocab_size": VOCABULARY,
            "vocab_size": VOCABULARY + 8,
        },
    ),
    "gemma3_multimodal": ("Gemma3Config", {"text_config": _GEMMA, "vision_config": _VISION, "mm_tokens_per_image": 4}),
    "llama4_multimodal": (
        "Llama4Config",
        {
            "architectures": ["Llama4ForConditionalGeneration"],
            "text_config": {**_EXPERTS, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 48},
            "vision_config": _VISION,
        },
    ),
    "mistral3_multimodal": ("Mistral3Config", {"text_config": {"model_type": "mistral"}, "vision_config": _VISION}),
    "qwen3_vl": (
        "Qwen3VLConfig",
        {
            "text_config": {
                "head_dim": 8,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            },
            "vision_config": _VISION,
        },
    ),
}
"""Name → configuration class of transformers and what it needs beyond `_COMMON`. Every kind of decoder we know of:
attention in all its forms, experts, recurrent states, and what stands between the last block and the logits."""


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 32,
}
"""Rotary frequencies that change for batches with a document of more than 32 tokens."""


def tiny_config(architecture: str, **changes: Any) -> Any:
    name, special = ARCHITECTURES[architecture]
    if "text_config" in special:
        text = {**_COMMON, **special["text_config"], **changes}
        return getattr(transformers, name)(**{**special, "text_config": text})
    return getattr(transformers, name)(**{**_COMMON, **special, **changes})


def tiny_model(architecture: str = "llama", *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model, the same each time."""
    torch.manual_seed(0)
    config = tiny_config(architecture, **changes)
    return auto_class(config).from_config(config, dtype=dtype).eval()


def save_teacher(folder: Path, architecture: str = "llama", **changes: Any) -> Path:
    tiny_model(architecture, **changes).save_pretrained(folder)
    return folder


def tiny_documents(lengths: Sequence[int], *, vocabulary: int = VOCABULARY, seed: int = 0) -> Documents:
    n = sum(lengths)
    return Documents(
        document_ids=[f"doc-{i:03d}" for i in range(len(lengths))],
        offsets=offsets_of(np.array(lengths, dtype=np.int64)),
        input_ids=np.random.default_rng(seed).integers(0, vocabulary, n).astype(np.uint32),
        loss_mask=np.ones(n, dtype=np.bool_),
    )


def tiny_params(folder: Path, **changes: Any) -> TeacherParams:
    """All three caches of a saved teacher, in small windows."""
    defaults: dict[str, Any] = {
        "model": str(folder),
        "weights_fingerprint": weights_fingerprint(folder, None),
        "tokenizer_fingerprint": "0" * 64,
        "dtype": "float32",
        "token_budget": 128,
        "part_documents": 5,
        "part_tokens": 10_000,
        "topk": TopkParams(k=4, max_length=64),
        "hidden_states": HiddenStateParams(blocks=(1,), max_length=64),
        "embeddings": EmbeddingParams(max_length=64),
    }
    return TeacherParams(**{**defaults, **changes})


class Desk:
    """A store in a folder, with shards to read and jobs to run against it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe_folder = folder / "store" / RECIPE
        self.events_file = folder / "events.jsonl"

    def commit_shard(self, documents: Documents, partition_key: str = "shard-00000") -> Path:
        output = plan_output(
            "shards_manifest", {"input": partition_key}, recipe_folder=self.recipe_folder, partition_key=partition_key
        )
        n = documents.n_documents
        table = encode_shard(documents, ["tiny"] * n, np.arange(n, dtype=np.int64))
        with self.writer(output, partition_key) as writer:
            writer.write_part(0, table, n_tokens=documents.n_tokens, stats=part_stats("shards_manifest", table))
            writer.commit(parts=1, checks={}, provenance={})
        return Path(output.path)

    def read_shard(self, documents: Documents) -> Shard:
        return read_shard(self.commit_shard(documents))

    def writer(self, output: Output, partition_key: str = "shard-00000") -> ResultWriter:
        return ResultWriter(output, recipe=RECIPE, recipe_folder=self.recipe_folder, partition_key=partition_key)

    def unit(
        self, shard_folder: Path, params: TeacherParams, assets: Sequence[Asset] = CACHES, key: str = "shard-00000"
    ) -> WorkUnit:
        identity = {"input": key, "teacher": params.weights_fingerprint}
        outputs = tuple(
            plan_output(a, {**identity, "asset": a}, recipe_folder=self.recipe_folder, partition_key=key)
            for a in assets
        )
        return WorkUnit(partition_key=key, inputs={"shards_manifest": (str(shard_folder),)}, outputs=outputs)

    def fresh_output(self, output: Output, *, run: int, partition_key: str = "shard-00000") -> Output:
        """The same output under another identity: a result that is not there yet."""
        return plan_output(
            output.asset, {**output.identity, "run": run}, recipe_folder=self.recipe_folder, partition_key=partition_key
        )

    def job(self, params: TeacherParams, units: Sequence[WorkUnit]) -> JobFile:
        return JobFile(
            kind="teacher",
            recipe=RECIPE,
            key="tiny-teacher",
            recipe_folder=str(self.recipe_folder),
            events_folder=str(self.folder / "events"),
            tasks=(tuple(range(len(units))),),
            units=tuple(units),
            teacher=params,
            provenance={"seen_by": "the control plane"},
        )

    def run(self, params: TeacherParams, unit: WorkUnit, stop: StopFlag | None = None) -> dict[str, Any]:
        """Load the teacher and run one unit in this process, as the worker does."""
        with Reporter(self.events_file, stream=io.StringIO()) as report:
            runner = TeacherRunner(self.job(params, [unit]), report, StopFlag() if stop is None else stop)
            try:
                return runner.run(unit)
            finally:
                runner.close()

    def events(self, event_type: str) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in self.events_file.read_text().splitlines()]
        return [record["data"] for record in records if record["type"] == event_type]


def part_bytes(unit: WorkUnit) -> dict[str, bytes]:
    """The bytes of every part file of a unit's outputs, by asset and name."""
    return {
        f"{output.asset}/{path.name}": path.read_bytes()
        for output in unit.outputs
        for path in sorted(Path(output.path).glob("part-*"))
    }


def bfloat16_values(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """What bits of bfloat16 stand for: the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
