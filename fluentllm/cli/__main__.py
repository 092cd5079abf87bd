"""`python -m fluentllm.cli`, where the script `fluent` is not on the path."""

from . import main

main()
