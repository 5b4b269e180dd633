"""What of transformers shardwise can run: a small model of every architecture, trained, then verified on layouts."""
