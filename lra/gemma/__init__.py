"""The Gemma track: a pretrained model with its attention exchanged."""
