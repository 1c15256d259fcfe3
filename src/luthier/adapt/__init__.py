"""Workshop: adapters put on a frozen base, taken off, saved, loaded, merged. The only room that swaps modules."""
