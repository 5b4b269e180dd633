"""One GPU, Llama-like models: shardwise beside a plain torch loop and transformers' Trainer."""
