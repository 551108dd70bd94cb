"""One process's part in a training run: its worker, its access to the server, and its files."""
