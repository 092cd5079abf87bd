"""An engine as a worker of NVIDIA Dynamo, behind Dynamo's own front end: what `fluent dynamo` runs.

Needs the packages `ai-dynamo-runtime` and `ai-dynamo`, which no extra installs: see docs/disaggregation.md.
"""
