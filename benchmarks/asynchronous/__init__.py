"""Workers that meet every so many steps beside replicas that sum every gradient: bytes and loss of the demo task."""
