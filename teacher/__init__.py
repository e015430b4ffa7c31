"""An R1-style teacher: the DeepSeek-V3 architecture in plain torch, its engine and its training."""
