"""Files to examples: read, recognise, check, split."""
