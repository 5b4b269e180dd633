"""What a run has written, beside what was predicted for it: files and events in, numbers and text out."""
