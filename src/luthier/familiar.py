"""Settings by the names of other tools: what each is called here, and what their values mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.errors import Fault

ALIASES = {
    "model_name_or_path": "model", "base_model": "model", "model_id": "model",
    "trust_remote_code": "model.trust_remote_code", "torch_dtype": "model.dtype", "dtype": "model.dtype",
    "dataset": "data.train", "train_file": "data.train", "train_data": "data.train",
    "val_size": "data.dev", "val_set_size": "data.dev", "test_size": "data.test", "eval_file": "data.dev",
    "cutoff_len": "data.max_length", "sequence_len": "data.max_length", "max_seq_length": "data.max_length",
    "max_length": "data.max_length", "chat_template": "template",
    "finetuning_type": "method", "adapter": "method", "peft_type": "method",
    "lora_r": "method.rank", "lora_rank": "method.rank", "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout", "lora_target": "method.target_modules",
    "target_modules": "method.target_modules", "lora_target_modules": "method.target_modules",
    "load_in_4bit": "quantize.name", "load_in_8bit": "quantize.name", "quantization_bit": "quantize.name",
    "bnb_4bit_quant_type": "quantize.name", "quantization_type": "quantize.name",
    "bnb_4bit_use_double_quant": "quantize.double", "double_quantization": "quantize.double",
    "bnb_4bit_compute_dtype": "quantize.compute",
    "stage": "objective", "num_train_epochs": "train.epochs", "num_epochs": "train.epochs", "epochs": "train.epochs",
    "learning_rate": "train.learning_rate", "lr": "train.learning_rate", "max_steps": "train.max_steps",
    "per_device_train_batch_size": "train.batch_size", "micro_batch_size": "train.batch_size",
    "batch_size": "train.batch_size", "lr_scheduler_type": "train.schedule", "warmup_ratio": "train.warmup",
    "weight_decay": "train.weight_decay", "max_grad_norm": "train.clip", "seed": "train.seed",
    "optim": "train.optimizer", "optimizer": "train.optimizer",
    "eval_steps": "train.eval_every", "save_steps": "train.save_every", "gradient_checkpointing": "train.checkpointing",
    "report_to": "train.report_to", "output_dir": "runs",
}  # fmt: skip
NO = object()  # a value that asks for nothing
# What other tools' values are called here; a value that is not listed keeps its name and is checked like our own.
VALUES: dict[str, dict[str, Any]] = {
    "load_in_4bit": {"True": "nf4", "False": NO},
    "load_in_8bit": {"True": "int8", "False": NO},
    "quantization_bit": {"4": "nf4", "8": "int8", "None": NO, "16": NO},
    "optim": {
        "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw_8bit": "adamw8bit",
        "adamw_bnb_8bit": "adamw8bit", "paged_adamw_32bit": "paged_adamw", "paged_adamw_8bit": "paged_adamw8bit",
    },
}  # fmt: skip
VALUES["optimizer"] = VALUES["optim"]
# Settings of other tools that nothing here answers to, with the reason.
REFUSED = {
    "llm_int8_threshold": "int8 is weight-only here: activations are not quantised, so no outliers are set apart",
    "llm_int8_has_fp16_weight": "a quantised base is frozen here",
    "llm_int8_skip_modules": "the matrices of the blocks are quantised; embeddings, norms and the head never are",
    "bnb_4bit_quant_storage": "weights are kept as bytes; sharding them over processes is not offered",
    "quantization_method": "bitsandbytes is the one way here: quantize: nf4, fp4 or int8",
}


def translate(written: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """Give other tools' values our names, and drop what asks for nothing; faults name what cannot be asked for.

    `load_in_4bit: true` beside `bnb_4bit_quant_type: fp4` is one wish, not two.
    """
    faults = [Fault(key, "is not a setting here", REFUSED[key]) for key in written if key in REFUSED]
    kept = {key: value for key, value in written.items() if key not in REFUSED}
    named = {key: VALUES[key].get(str(kept[key]), kept[key]) for key in VALUES if key in kept}
    kept = {key: named.get(key, value) for key, value in kept.items() if named.get(key) is not NO}
    bits = {key: kept[key] for key in ("load_in_4bit", "load_in_8bit", "quantization_bit") if key in kept}
    if len(set(map(str, bits.values()))) > 1:
        asked = " and ".join(f"{key}: {written[key]}" for key in bits)
        faults.append(Fault(next(iter(bits)), f"cannot all be: {asked}", "write quantize: nf4, fp4 or int8"))
    kinds = [key for key in ("bnb_4bit_quant_type", "quantization_type") if key in kept]
    first = next((key for key, value in bits.items() if value != "nf4" or not kinds), None)
    for key in bits:
        if key != first:
            del kept[key]
    return kept, faults
