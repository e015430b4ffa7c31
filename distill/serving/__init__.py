"""vLLM, run by us: its engine for `teacher.kind: vllm`, its server for `distill teacher serve`, clusters of it."""
