"""Strings to token ids: the tokenizer contract and its back ends."""
