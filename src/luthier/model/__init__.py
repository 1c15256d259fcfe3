"""Everything that holds tensors: catalog, load, attention, adapters, generation."""
