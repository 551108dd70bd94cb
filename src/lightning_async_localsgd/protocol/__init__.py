"""What workers and the server exchange: messages, the model's layout, buffers and interfaces. No I/O, no threads."""
