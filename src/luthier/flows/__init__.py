"""One page per verb."""
