"""What 16 bits cost in loss: the demo task in float32 and in emulated bfloat16 and float16."""
