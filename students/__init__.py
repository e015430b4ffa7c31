"""Fine-tuning dense Qwen and LLaMA students on reasoning traces."""
