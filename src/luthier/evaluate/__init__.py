"""Judgement: predictions, paired statistics, the report."""
