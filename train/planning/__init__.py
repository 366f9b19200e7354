"""What a run needs, before it starts: memory, hardware, the ZeRO stage that fits."""
