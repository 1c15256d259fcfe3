"""Messages to tokens and back: tokenizer, render, pack, show."""
