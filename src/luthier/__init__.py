"""Fine-tune a language model for one task, and learn honestly whether it helped."""

__version__ = "0.1.0"
