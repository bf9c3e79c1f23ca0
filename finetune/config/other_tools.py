"""Keys as PEFT, TRL, transformers, Axolotl, Unsloth and torchtune call them, and what they are here."""

from __future__ import annotations

from collections.abc import Mapping

# Keys of the schema, and the other tools' names for them.
_SAME_MEANING: tuple[tuple[str, str], ...] = (
    ("adapter.attention.rank adapter.experts.rank", "r lora_r lora_rank"),
    ("adapter.attention.alpha adapter.experts.alpha", "lora_alpha"),
    ("adapter.attention.dropout", "lora_dropout"),
    ("adapter.attention.targets adapter.experts.rank", "target_modules lora_target_modules lora_attn_modules"),
    ("adapter.attention.targets adapter.experts.rank", "lora_target_linear apply_lora_to_mlp"),
    ("adapter.experts.rank", "target_parameters lora_target_parameters"),
    ("adapter.rslora", "use_rslora peft_use_rslora"),
    ("adapter.layers", "layers_to_transform peft_layers_to_transform"),
    ("adapter.init_from", "lora_model_dir adapter_path"),
    ("adapter", "lora peft peft_config lora_config"),
    ("trainer", "training training_args training_arguments optimization"),
    ("trainer.learning_rate", "lr"),
    ("trainer.epochs", "num_train_epochs num_epochs"),
    ("trainer.max_steps", "max_train_steps max_iters"),
    (
        "trainer.micro_batch_size trainer.gradient_accumulation_steps",
        "batch_size per_device_train_batch_size train_batch_size per_gpu_train_batch_size global_batch_size",
    ),
    ("trainer.gradient_accumulation_steps", "grad_accumulation_steps accumulation_steps gradient_accumulation"),
    ("trainer.max_grad_norm", "gradient_clipping gradient_clip_val clip_grad_norm grad_clip max_norm"),
    ("trainer.warmup_ratio", "warmup_steps num_warmup_steps lr_warmup_steps"),
    ("trainer.schedule", "lr_scheduler lr_scheduler_type scheduler"),
    ("trainer.min_lr_ratio", "lr_scheduler_kwargs cosine_min_lr_ratio min_lr"),
    ("trainer.optimizer", "optim"),
    ("trainer.adam_beta1 trainer.adam_beta2", "betas adam_betas"),
    ("trainer.adam_eps", "eps"),
    ("trainer.activation_checkpointing", "gradient_checkpointing enable_activation_checkpointing"),
    ("trainer.activation_offload", "activation_offloading enable_activation_offloading"),
    ("trainer.router_balance_coefficient", "router_aux_loss_coef aux_loss_coef"),
    ("trainer.router_z_loss_coefficient", "z_loss router_z_loss_coef"),
    ("trainer.early_stop_patience", "early_stopping_patience"),
    ("data.max_length", "max_seq_length max_seq_len seq_len seq_length sequence_len cutoff_len model_max_length"),
    (
        "data.train.NAME.path",
        "datasets dataset dataset_name dataset_path train_file train_dataset data_path data_files",
    ),
    ("data.validation.NAME.path", "eval_dataset val_dataset validation_file"),
    ("data.test.NAME.path", "test_dataset test_datasets test_file"),
    ("data.validation_split.share", "val_set_size validation_split_percentage"),
    ("data.loss", "train_on_inputs train_on_input assistant_only_loss completion_only_loss mask_prompt roles_to_train"),
    ("data.convention", "chat_template"),
    ("data.train.NAME.columns", "dataset_text_field field_messages column_map"),
    ("data.train.NAME.form", "conversation_style dataset_type"),
    ("data.cache_dir", "dataset_prepared_path"),
    ("model.path", "base_model model_name_or_path model_name model_id pretrained_model_name_or_path"),
    ("model.device", "device_map"),
    ("model.compute_dtype", "bf16 fp16 torch_dtype precision mixed_precision"),
    ("model.compute_dtype adapter.dtype", "dtype"),
    (
        "model.expert_storage model.attention_storage",
        "load_in_4bit load_in_8bit bnb_4bit_quant_type quantization_config",
    ),
    ("model.attention_kernel", "flash_attention flash_attn attn_implementation"),
    ("distributed.num_processes", "num_gpus gpus nproc_per_node world_size n_gpu"),
    ("distributed.kind", "deepspeed fsdp fsdp_config ddp strategy"),
    ("logging.tracker", "report_to use_wandb"),
    ("logging.project", "wandb_project"),
    ("logging.every_steps", "logging_steps log_every_n_steps"),
    ("evaluate.every_steps", "eval_steps eval_strategy evaluation_strategy evals_per_epoch"),
    ("save.every_steps", "save_steps save_strategy saves_per_epoch"),
    ("save.keep", "save_total_limit"),
    ("save.best_metric", "load_best_model_at_end metric_for_best_model"),
    ("name", "run_name"),
    ("seed", "data_seed random_seed"),
)

# Other tools' keys that need a sentence: what there is here, or why there is nothing.
_REMARKS: Mapping[str, str] = {
    **dict.fromkeys(
        ("packing", "sample_packing", "packed"),
        "that is data.pack, which is true unless a recipe says otherwise",
    ),
    **dict.fromkeys(
        ("use_dora", "peft_use_dora"), "there is no key: adapters are plain LoRA, which every serving stack reads"
    ),
    **dict.fromkeys(
        ("modules_to_save", "lora_modules_to_save"),
        "there is no key: only LoRA is trained, and with adapter.router.mode=full the routers",
    ),
    "init_lora_weights": "there is no key: A begins random and B zero; adapter.init_from continues another adapter",
    **dict.fromkeys(
        ("per_device_eval_batch_size", "eval_batch_size"),
        "there is no key: an evaluation takes one packed sequence of data.max_length at a time",
    ),
    **dict.fromkeys(
        ("dataloader_num_workers", "dataset_num_proc", "num_workers"),
        "there is no key: tokens are made once and read from the cache",
    ),
    "shuffle": "there is no key: the order of examples follows from seed",
    **dict.fromkeys(
        ("resume_from_checkpoint", "auto_resume_from_checkpoints"),
        "there is no key: `finetune train --resume RUN` continues a run",
    ),
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id"), "there is no key: `finetune export RUN` writes a directory that you can upload"
    ),
    "trust_remote_code": "there is no key: code from a checkpoint is never run",
    **dict.fromkeys(
        ("tokenizer", "tokenizer_name", "tokenizer_name_or_path"),
        "there is no key: the tokenizer of gpt-oss ships with the toolkit",
    ),
    "task_type": "there is no key: the objective is chosen by the group, objective=sft",
    "torch_compile": "there is no key: model.expert_kernel and model.attention_kernel choose the kernels",
}


def keys_for(word: str) -> tuple[str, ...]:
    """Name the keys with the meaning of another tool's key; none if there are none or the word is not known."""
    return _KEYS.get(word.lower(), ())


def remark_on(word: str) -> str | None:
    """Say what to do about another tool's key that has no namesake here, None if that is not known."""
    return _REMARKS.get(word.lower())


_KEYS = {word: tuple(keys.split()) for keys, words in _SAME_MEANING for word in words.split()}
