"""What `fluent bench` measures: latency and throughput of an engine in this process, and a server under load."""
