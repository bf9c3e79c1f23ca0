"""Harmony, the format of gpt-oss: a conversation becomes tokens with loss weights.

tokenizer: the published vocabulary. encode: one message as tokens. template: what the published Jinja template writes
differently. render: whole conversations, prompts and answers. truncate: examples that are too long.
"""
