"""Offline jobs, `fluent run JOB.yaml`: prompts from a JSONL file, results to another, in order, resumable after a kill."""
