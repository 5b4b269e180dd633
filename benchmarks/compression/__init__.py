"""What compressed communication saves and costs: bytes on the wire, and the loss of the demo task."""
