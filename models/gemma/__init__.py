"""Pretrained Gemma models with their attention exchanged; needs transformers, which nothing else does."""
