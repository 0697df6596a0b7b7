"""lm-evaluation-harness on models in memory; needs the package `lm_eval`."""
