"""The collector: checks what devices send, stores it, and acknowledges what is stored."""
